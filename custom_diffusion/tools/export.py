"""Export a trained concept for other programs: a LoRA, AUTOMATIC1111's and ComfyUI's files, or a whole pipeline.

custom-diffusion export cat --to lora --output cat-lora          diffusers: load_lora_weights, load_textual_inversion
custom-diffusion export cat --to a1111 --output cat-webui        AUTOMATIC1111, Forge, ComfyUI: copy both folders
custom-diffusion export cat --to pipeline --output cat-model     DiffusionPipeline.from_pretrained, no code of ours
"""

from __future__ import annotations

import argparse
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

    from custom_diffusion.model.source import ModelSource
    from custom_diffusion.weights.format import ConceptWeights
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
    from custom_diffusion.model.source import base_of
    from custom_diffusion.weights.format import as_weights
    from custom_diffusion.weights.low_rank import changes, decompose, rank_summary

    check_output_folder(output)
    weights, output = as_weights(weights), Path(output)
    source = base_of(weights.config, model, revision, variant, config_from)
    empty_unet_for(weights, source)
    if to == "pipeline":
        export_pipeline(weights, source, output)
        return f"{output}: draw with DiffusionPipeline.from_pretrained({str(output)!r})"
    if rank is None and share is None:
        share = DEFAULT_SHARE
    base = base_tensors(source, weights.shapes())
    decompositions = decompose(changes(weights, base))
    lora, ranks = lora_state(decompositions, rank=rank, share=share)
    kept = min(parts.kept(rank) for parts, rank in zip(decompositions.values(), ranks))
    warn_about_biases(weights, base)
    if to == "lora":
        how = write_lora(output, lora, weights)
    else:
        names = embedding_names(list(weights.tokens))
        warn_about_words(names, source)
        how = write_a1111(output, lora, weights, names)
    return f"{output}: {rank_summary(ranks)}, {100 * kept:.2f} % or more of every squared change; {how}"


def lora_state(
    decompositions: dict[str, Decomposition], *, rank: int | None, share: float | None
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A LoRA in the names that A1111, ComfyUI, Forge and diffusers read, and the rank of each layer.

    Args:
        rank: the same for every layer, or None: the smallest that keep `share` of the squared singular values.
    """
    import torch

    from custom_diffusion.weights.low_rank import stored_dtype

    deltas = {n: parts.truncated(rank or parts.rank_for(share, power=2)) for n, parts in decompositions.items()}
    ranks = [delta.up.shape[1] for delta in deltas.values()]
    # Programs scale by alpha / rank. Of several alphas diffusers 0.42 applies the most frequent to all layers, so there is
    # one, and what it would scale wrongly is taken out of the factors.
    alpha = float(max(ranks))
    state = {}
    for (name, delta), layer_rank in zip(deltas.items(), ranks):
        up = delta.up * (layer_rank / alpha)
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        state[f"{key}.lora_up.weight"] = up.to(stored_dtype(share)).contiguous()
        state[f"{key}.lora_down.weight"] = delta.down.to(stored_dtype(share)).contiguous()
        state[f"{key}.alpha"] = torch.tensor(alpha)
    return state, ranks


def warn_about_biases(weights: ConceptWeights, base: dict[str, torch.Tensor]) -> None:
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


def _metadata(lora):
    """What A1111 (`ss_...`) and Forge (`modelspec...`) tell the model's version by. A1111 hides LoRAs of another."""
    width = next(tensor.shape[1] for key, tensor in lora.items() if key.endswith("to_k.lora_down.weight"))
    second = width == 1024  # text features of Stable Diffusion 2.x; 768 in 1.x
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_v2": str(second),
        "ss_base_model_version": "sd_v2" if second else "sd_v1",
    }
    # For 2.x it would have to say whether the model predicts velocities, which the weights do not.
    return metadata if second else metadata | {"modelspec.architecture": "stable-diffusion-v1/lora"}


def write_lora(output: Path, lora: dict[str, torch.Tensor], weights: ConceptWeights) -> str:
    """`LORA_FILE` beside one file per token; returns how to use them."""
    from safetensors.torch import save_file

    with whole_folder(output) as folder:
        save_file(lora, folder / LORA_FILE, metadata=_metadata(lora))
        for token, embedding in weights.tokens.items():
            save_file({token: embedding.clone()}, folder / f"{token}.safetensors")
    return "; ".join([
        # Offline, older versions of diffusers do not look for the file.
        f"pipe.load_lora_weights({str(output)!r}, weight_name={LORA_FILE!r})",
        *(
            f"pipe.load_textual_inversion({str(output)!r}, weight_name={token + '.safetensors'!r})"
            for token in weights.tokens
        ),
    ])  # fmt: skip


def write_a1111(output: Path, lora: dict[str, torch.Tensor], weights: ConceptWeights, names: dict[str, str]) -> str:
    """`Lora/<output's name>.safetensors` and `embeddings/<word>.safetensors`; returns how to use them."""
    from safetensors.torch import save_file

    with whole_folder(output) as folder:
        for part in ("Lora", "embeddings"):
            (folder / part).mkdir()
        save_file(lora, folder / "Lora" / f"{lora_name(output)}.safetensors", metadata=_metadata(lora))
        for token, embedding in weights.tokens.items():
            path = folder / "embeddings" / f"{names[token]}.safetensors"
            save_file({"emb_params": embedding.float().unsqueeze(0).clone()}, path)
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

    from custom_diffusion.model.loading import load_pipeline
    from custom_diffusion.weights.pipeline import load_custom_diffusion

    pipe = load_pipeline(source, torch.float32)
    try:
        load_custom_diffusion(pipe, weights)
    except ValueError as error:
        raise InputError(f"weights: {error}") from None
    with whole_folder(output) as folder:
        pipe.save_pretrained(folder)
