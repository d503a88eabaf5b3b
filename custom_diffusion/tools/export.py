"""Export a trained concept for other programs: a LoRA, AUTOMATIC1111's and ComfyUI's files, or a whole pipeline.

custom-diffusion export cat --to lora --output cat-lora          diffusers: load_lora_weights, load_textual_inversion
custom-diffusion export cat --to a1111 --output cat-webui        AUTOMATIC1111, Forge, ComfyUI: copy both folders
custom-diffusion export cat --to pipeline --output cat-model     DiffusionPipeline.from_pretrained, no code of ours
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from custom_diffusion.cli.tool_flags import (
    add_model_flags,
    check_output_folder,
    model_problems,
    output_folder_problems,
    weights_problems,
)
from custom_diffusion.errors import InputError, warn
from custom_diffusion.files import LORA_FILE, whole_folder

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

    from custom_diffusion.families import Family
    from custom_diffusion.model.source import ModelSource
    from custom_diffusion.weights.format import ConceptWeights, LowRankDelta
    from custom_diffusion.weights.low_rank import Decomposition

DEFAULT_SHARE = 0.99
NOT_IN_LORA_NAMES = set(":=>")  # they end the name in <lora:NAME:1>


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help="trained folder, checkpoint folder or Hub id")
    parser.add_argument("--to", required=True, choices=["lora", "a1111", "pipeline"], help="for which program")
    parser.add_argument("--output", required=True, help="folder to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="rank of the LoRA, the same in every layer")
    size.add_argument(
        "--share",
        type=float,
        help="or the share of the squared singular values that every layer's rank must keep; 1 for all "
        f"(default: {DEFAULT_SHARE})",
    )
    add_model_flags(parser)


def flag_problems(args: argparse.Namespace) -> list[str]:
    problems = weights_problems("weights", args.weights) + model_problems(args) + output_folder_problems(args.output)
    if args.to == "a1111" and (wrong := sorted(NOT_IN_LORA_NAMES & set(lora_name(Path(args.output))))):
        problems.append(f"--output: A1111 cannot read {' '.join(wrong)} in a LoRA's name; name another folder")
    if args.share is not None and not 0 < args.share <= 1:
        problems.append(f"--share: {args.share} must be above 0 and at most 1")
    if args.rank is not None and args.rank < 1:
        problems.append(f"--rank: {args.rank} must be 1 or more")
    if args.to == "pipeline":
        problems += [
            f"--{n}: has no meaning with --to pipeline" for n in ("rank", "share") if getattr(args, n) is not None
        ]
    return problems


def lora_name(output: Path) -> str:
    return output.resolve().name


def main(args: argparse.Namespace) -> None:
    """Export, and say how it is used."""
    flags = {name: value for name, value in vars(args).items() if name != "tool"}
    print(export(flags.pop("weights"), **flags))


def export(
    weights: ConceptWeights | str | Path,
    *,
    to: str,
    output: str | Path,
    rank: int | None = None,
    share: float | None = None,
    model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config_from: str | None = None,
) -> str:
    """Write a trained concept as other programs read it.

    Args:
        weights: trained folder, checkpoint folder, Hub id, or weights already read.
        to: "lora", "a1111" or "pipeline". output: folder to write.
        rank: of the LoRA in every layer; or share: of the squared singular values that every layer must keep, 0.99 if neither
            is given.
        model, revision, variant: the base model, by default the one that the weights name.
        config_from: folder or Hub id that has the configuration and tokenizers of a base model in one file.
    Returns:
        A line that says what was kept, and how to use it.
    Raises:
        InputError: the weights or the model cannot be used, or the output folder holds something.
    """
    from custom_diffusion.model.loading import base_tensors, empty_unet_for
    from custom_diffusion.model.source import base_of, read_index
    from custom_diffusion.weights.format import as_weights
    from custom_diffusion.weights.low_rank import decompositions, rank_summary, stored_dtype

    check_output_folder(output)
    weights, output = as_weights(weights), Path(output)
    source = base_of(weights.config, model, revision, variant, config_from)
    family, _ = read_index(source)
    unet = empty_unet_for(weights, source)
    if to == "pipeline":
        export_pipeline(weights, source, output)
        return f"{output}: draw with DiffusionPipeline.from_pretrained({str(output)!r})"
    if rank is None and share is None:
        share = DEFAULT_SHARE
    base = base_tensors(source, weights.shapes())
    deltas, kept = truncated(decompositions(weights, base), rank=rank, share=share)
    ranks, metadata = [delta.up.shape[1] for delta in deltas.values()], lora_metadata(deltas, family)
    lora = lora_state(deltas, lora_names(deltas, unet, family), stored_dtype(share))
    warn_about_biases(weights, base)
    if to == "lora":
        how = write_lora(output, lora, metadata, weights, family)
    else:
        names = embedding_names(list(weights.tokens))
        warn_about_words(names, source)
        how = write_a1111(output, lora, metadata, weights, names)
    return f"{output}: {rank_summary(ranks)}, {100 * min(kept):.2f} % or more of every squared change; {how}"


def truncated(
    decompositions: Iterable[tuple[str, Decomposition]], *, rank: int | None, share: float | None
) -> tuple[dict[str, LowRankDelta], list[float]]:
    """The changes at the rank that is asked for, float32, and what each keeps of its squared singular values.

    Args:
        decompositions: of each matrix's change, by name; used up.
        rank: the same for every layer, or None: the smallest that keep `share` of the squared singular values.
    """
    deltas, kept = {}, []
    for name, parts in decompositions:
        deltas[name] = parts.truncated(rank or parts.rank_for(share, power=2))
        kept.append(parts.kept(deltas[name].up.shape[1]))
    return deltas, kept


def lora_state(deltas: dict[str, LowRankDelta], names: dict[str, str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A LoRA's tensors, in `dtype`.

    Args:
        deltas: used up, each as its tensors come: the two together would be twice the file.
        names: of each delta, as `lora_names` has them.
    """
    import torch

    # Programs scale by alpha / rank. Of several alphas diffusers 0.42 applies the most frequent to all layers, so there is
    # one, and what it would scale wrongly is taken out of the factors.
    alpha = float(max(delta.up.shape[1] for delta in deltas.values()))
    state = {}
    for name in list(deltas):
        delta = deltas.pop(name)
        up = delta.up * (delta.up.shape[1] / alpha)
        state[f"{names[name]}.lora_up.weight"] = up.to(dtype).contiguous()
        state[f"{names[name]}.lora_down.weight"] = delta.down.to(dtype).contiguous()
        state[f"{names[name]}.alpha"] = torch.tensor(alpha)
    return state


def lora_names(parameters: Iterable[str], unet: UNet2DConditionModel, family: Family) -> dict[str, str]:
    """Parameter -> its layer's name in LoRAs that A1111, ComfyUI, Forge, kohya's programs and diffusers all read."""
    names = {}
    for parameter in parameters:
        layer = parameter.removesuffix(".weight")
        if family.original_names:
            layer = original_name(layer, unet.config.layers_per_block)
        names[parameter] = "lora_unet_" + layer.replace(".", "_")
    return names


def original_name(layer: str, layers_per_block: int) -> str:
    """What a layer of an attention is called in the original layout: there blocks are counted through, and their attentions second.

    Args:
        layer: as diffusers calls it, "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k".
    """
    block, rest = re.fullmatch(r"(.+?)\.attentions\.(.+)", layer).groups()
    index, rest = rest.split(".", 1)
    if block == "mid_block":
        return f"middle_block.1.{rest}"
    side, number = block.split("_blocks.")
    # Each block has one more part than attentions: down, what halves the size; up, what uses the additional skip connection.
    place = int(number) * (layers_per_block + 1) + int(index)
    return f"input_blocks.{place + 1}.1.{rest}" if side == "down" else f"output_blocks.{place}.1.{rest}"


def lora_metadata(deltas: dict[str, LowRankDelta], family: Family) -> dict[str, str]:
    """What programs tell the model's version by."""
    width = next(delta.down.shape[1] for name, delta in deltas.items() if name.endswith("to_k.weight"))
    versions = family.lora_versions
    return {"format": "pt", "ss_network_module": "networks.lora", **versions.get(width, versions[None])}


def warn_about_biases(weights: ConceptWeights, base: Mapping[str, torch.Tensor]) -> None:
    """A LoRA has no place for biases, which `--freeze_model crossattn` trains in `to_out`."""
    changed = [
        (tensor.float() - base[name]).abs().max().item()
        for name, tensor in weights.tensors.items()
        if tensor.dim() == 1
    ]
    if changed and max(changed) > 0:
        warn(
            f"a LoRA cannot hold the {len(changed)} trained biases of to_out: left out (largest change {max(changed):.2g}); "
            "--to pipeline keeps them"
        )


def warn_about_words(names: dict[str, str], source: ModelSource) -> None:
    """A1111 and Forge put an embedding in the place of its file's name wherever a prompt has it."""
    from custom_diffusion.model.loading import load_tokenizer

    tokenizer = load_tokenizer(source)
    for token, name in names.items():
        if len(tokenizer.tokenize(name)) == 1:
            warn(
                f"{token} becomes {name!r}, an ordinary word, which A1111 and Forge will replace in every prompt; "
                f"rename embeddings/{name}.safetensors if you do not want that"
            )


def write_lora(
    output: Path, lora: dict[str, torch.Tensor], metadata: dict[str, str], weights: ConceptWeights, family: Family
) -> str:
    """`LORA_FILE` beside one file per token; returns how to use them."""
    from custom_diffusion.weights.format import save_tensors, token_to_file

    with whole_folder(output) as folder:
        save_tensors(lora, folder / LORA_FILE, metadata)
        for token, embedding in weights.tokens.items():
            save_tensors(token_to_file(token, embedding, weights.token_widths), folder / f"{token}.safetensors")
    return "; ".join([
        # Offline, older versions of diffusers do not look for the file.
        f"pipe.load_lora_weights({str(output)!r}, weight_name={LORA_FILE!r})",
        *family.words_code(
            list(weights.tokens), str(output), ".safetensors",
            lambda file: f"safetensors.torch.load_file({str(output / file)!r})",
        ),
    ])  # fmt: skip


def write_a1111(
    output: Path,
    lora: dict[str, torch.Tensor],
    metadata: dict[str, str],
    weights: ConceptWeights,
    names: dict[str, str],
) -> str:
    """`Lora/<output's name>.safetensors` and `embeddings/<word>.safetensors`; returns how to use them."""
    from custom_diffusion.weights.format import save_tensors, token_to_file

    with whole_folder(output) as folder:
        for part in ("Lora", "embeddings"):
            (folder / part).mkdir()
        save_tensors(lora, folder / "Lora" / f"{lora_name(output)}.safetensors", metadata)
        for token, embedding in weights.tokens.items():
            path = folder / "embeddings" / f"{names[token]}.safetensors"
            if weights.token_widths:
                rows = token_to_file(token, embedding.float(), weights.token_widths)
            else:
                rows = {"emb_params": embedding.float().unsqueeze(0)}
            save_tensors(rows, path)
    return (
        "copy Lora/ and embeddings/ into the program's folders. "
        f"A1111, Forge: prompt {' '.join(names.values())} <lora:{lora_name(output)}:1>. "
        f"ComfyUI: Load LoRA node, prompt {' '.join(f'embedding:{name}' for name in names.values())}"
    )


def embedding_names(tokens: list[str]) -> dict[str, str]:
    """Token -> file name and prompt word in A1111, where < and > have a meaning of their own.

    Raises:
        InputError: two tokens would get the same word.
    """
    names = {token: token.strip("<>") or token for token in tokens}
    if len(set(names.values())) < len(names):
        raise InputError(f"weights: tokens {', '.join(tokens)} have the same name without < and >; export them apart")
    return names


def export_pipeline(weights: ConceptWeights, source: ModelSource, output: Path) -> None:
    """The whole base model with everything merged in, in float32."""
    import torch
    from safetensors import SafetensorError

    from custom_diffusion.model.loading import load_pipeline
    from custom_diffusion.weights.pipeline import load_custom_diffusion

    pipe = load_pipeline(source, torch.float32)
    try:
        load_custom_diffusion(pipe, weights)
    except ValueError as error:
        raise InputError(f"weights: {error}") from None
    with whole_folder(output) as folder:
        try:
            pipe.save_pretrained(folder)
        except SafetensorError as error:  # what that library makes of a full disk
            raise OSError(str(error)) from None
