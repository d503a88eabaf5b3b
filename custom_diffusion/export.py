"""Export a trained concept for other programs: a LoRA, AUTOMATIC1111's and ComfyUI's files, or a whole pipeline."""

# ruff: noqa: E402 (flags are parsed before the imports that take seconds)

import argparse
from pathlib import Path

from custom_diffusion.args import InputError
from custom_diffusion.command import (
    add_model_flags,
    make_parser,
    model_problems,
    output_folder_problems,
    parse,
    run,
    warn,
    weights_problems,
)

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' own name for it
NOT_IN_LORA_NAMES = set(":=>")  # they end the name in <lora:NAME:1>
EXAMPLE = """

  python -m custom_diffusion.export logs/cat --to lora --output cat-lora          diffusers: load_lora_weights, load_textual_inversion
  python -m custom_diffusion.export logs/cat --to a1111 --output cat-webui        AUTOMATIC1111, Forge, ComfyUI: copy both folders
  python -m custom_diffusion.export logs/cat --to pipeline --output cat-model     DiffusionPipeline.from_pretrained, no code of ours
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("export", __doc__ + EXAMPLE)
    parser.add_argument("weights", help="trained folder, checkpoint folder or Hub id")
    parser.add_argument("--to", required=True, choices=["lora", "a1111", "pipeline"], help="for which program")
    parser.add_argument("--output", required=True, help="folder to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="rank of the LoRA, the same in every layer")
    size.add_argument(
        "--share",
        type=float,
        help="or the share of the squared singular values that every layer's rank must keep; 1 for all (default: 0.99)",
    )
    add_model_flags(parser)
    args = parse(parser, argv, _problems)
    if args.rank is None and args.share is None:
        args.share = 0.99
    return args


def _problems(args):
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


if __name__ == "__main__":
    args = parse_args()

import safetensors.torch
import torch

from custom_diffusion.base_model import (
    base_of,
    base_tensors,
    check_shapes,
    empty_unet,
    load_pipeline,
    load_tokenizer,
    read_concept,
)
from custom_diffusion.files import whole_folder
from custom_diffusion.low_rank import Decomposition, changes, decompose, rank_summary, stored_dtype
from custom_diffusion.models import ModelSource
from custom_diffusion.weights import ConceptWeights, load_custom_diffusion


def main(args: argparse.Namespace) -> None:
    weights = read_concept("weights", args.weights)
    source = base_of(args, weights.config)
    check_shapes(weights, empty_unet(source), source)
    output = Path(args.output)
    if args.to == "pipeline":
        export_pipeline(args.weights, source, output)
        print(f"{output}: draw with DiffusionPipeline.from_pretrained({args.output!r})")
        return
    base = base_tensors(source, weights.shapes())
    decompositions = decompose(changes(weights, base))
    lora, ranks = lora_state(decompositions, rank=args.rank, share=args.share)
    kept = min(parts.kept(rank) for parts, rank in zip(decompositions.values(), ranks))
    warn_about_biases(weights, base)
    if args.to == "lora":
        write_lora(output, lora, weights)
        # Offline, older versions of diffusers do not look for the file.
        how = f"pipe.load_lora_weights({args.output!r}, weight_name={LORA_FILE!r}); " + "; ".join(
            f"pipe.load_textual_inversion({args.output!r}, weight_name={token + '.safetensors'!r})"
            for token in weights.tokens
        )
    else:
        names = embedding_names(list(weights.tokens))
        warn_about_words(names, source)
        write_a1111(output, lora, weights, names)
        how = (
            "copy Lora/ and embeddings/ into the program's folders. "
            f"A1111, Forge: prompt {' '.join(names.values())} <lora:{lora_name(output)}:1>. "
            f"ComfyUI: Load LoRA node, prompt {' '.join(f'embedding:{name}' for name in names.values())}"
        )
    print(f"{args.output}: {rank_summary(ranks)}, {100 * kept:.2f} % or more of every squared change; {how}")


def lora_state(
    decompositions: dict[str, Decomposition], *, rank: int | None, share: float | None
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A LoRA in the names that A1111, ComfyUI, Forge and diffusers read, and the rank of each layer.

    Args:
        rank: the same for every layer, or None: the smallest that keep `share` of the squared singular values.
    """
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


def write_lora(output: Path, lora: dict[str, torch.Tensor], weights: ConceptWeights) -> None:
    """The names that diffusers looks for, beside one file per token."""
    with whole_folder(output) as folder:
        safetensors.torch.save_file(lora, folder / LORA_FILE, metadata=_metadata(lora))
        for token, embedding in weights.tokens.items():
            safetensors.torch.save_file({token: embedding.clone()}, folder / f"{token}.safetensors")


def write_a1111(output: Path, lora: dict[str, torch.Tensor], weights: ConceptWeights, names: dict[str, str]) -> None:
    """`Lora/<output's name>.safetensors` and `embeddings/<word>.safetensors`, which A1111, Forge and ComfyUI read."""
    with whole_folder(output) as folder:
        for part in ("Lora", "embeddings"):
            (folder / part).mkdir()
        safetensors.torch.save_file(
            lora, folder / "Lora" / f"{lora_name(output)}.safetensors", metadata=_metadata(lora)
        )
        for token, embedding in weights.tokens.items():
            path = folder / "embeddings" / f"{names[token]}.safetensors"
            safetensors.torch.save_file({"emb_params": embedding.float().unsqueeze(0).clone()}, path)


def embedding_names(tokens: list[str]) -> dict[str, str]:
    """Token -> file name and prompt word in A1111, where < and > have a meaning of their own.

    Raises:
        InputError: two tokens would get the same word.
    """
    names = {token: token.strip("<>") or token for token in tokens}
    if len(set(names.values())) < len(names):
        raise InputError(f"weights: tokens {', '.join(tokens)} have the same name without < and >; export them apart")
    return names


def export_pipeline(path_or_hub_id: str, source: ModelSource, output: Path) -> None:
    """The whole base model with everything merged in, in float32."""
    pipe = load_pipeline(source, torch.float32)
    try:
        load_custom_diffusion(pipe, path_or_hub_id)
    except ValueError as error:
        raise InputError(f"weights: {error}") from None
    with whole_folder(output) as folder:
        pipe.save_pretrained(folder)


if __name__ == "__main__":
    run("export", main, args)
