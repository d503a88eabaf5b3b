"""Compress trained weights: keep only the strongest part of what training changed."""

# ruff: noqa: E402 (flags are parsed before the imports that take seconds)

import argparse
from pathlib import Path

from custom_diffusion.command import (
    add_model_flags,
    make_parser,
    model_problems,
    output_folder_problems,
    parse,
    run,
    weights_problems,
)

EXAMPLE = """

  python -m custom_diffusion.compress logs/cat --output logs/cat-small

Of every matrix's change from the base model the leading singular values are kept, up to a share of their sum (Custom Diffusion,
section 3.3 and appendix). The result is loaded by load_custom_diffusion like any trained folder.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("compress", __doc__ + EXAMPLE)
    parser.add_argument("weights", help="trained folder or Hub id")
    parser.add_argument("--output", required=True, help="folder to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--energy", type=float, help="share of the sum of singular values to keep (default: 0.6)")
    size.add_argument("--rank", type=int, help="or the number of singular values to keep, the same in every matrix")
    add_model_flags(parser)
    args = parse(parser, argv, _problems)
    if args.rank is None and args.energy is None:
        args.energy = 0.6
    return args


def _problems(args):
    problems = weights_problems("weights", args.weights) + model_problems(args) + output_folder_problems(args.output)
    if args.energy is not None and not 0 < args.energy <= 1:
        problems.append(f"--energy: {args.energy} must be above 0 and at most 1")
    if args.rank is not None and args.rank < 1:
        problems.append(f"--rank: {args.rank} must be 1 or more")
    return problems


if __name__ == "__main__":
    args = parse_args()

from custom_diffusion.base_model import base_of, base_tensors, check_shapes, empty_unet, read_concept
from custom_diffusion.files import whole_folder
from custom_diffusion.low_rank import Decomposition, changes, decompose, rank_summary, stored_dtype
from custom_diffusion.weights import ConceptWeights, LowRankDelta, write_weights


def main(args: argparse.Namespace) -> None:
    weights = read_concept("weights", args.weights)
    source = base_of(args, weights.config)
    unet = empty_unet(source)
    check_shapes(weights, unet, source)
    decompositions = decompose(changes(weights, base_tensors(source, weights.shapes())))
    compressed = compress(weights, decompositions, energy=args.energy, rank=args.rank)
    # A different --model is what the deltas are now relative to.
    compressed.config |= {"base_model": source.path, "revision": source.revision, "variant": source.variant}
    with whole_folder(Path(args.output)) as folder:
        write_weights(folder, compressed, unet, ("safetensors",))
        after = sum(path.stat().st_size for path in folder.iterdir())
    before = 4 * sum(shape.numel() for shape in weights.shapes().values())
    ranks = [delta.up.shape[1] for delta in compressed.deltas.values()]
    kept = [decompositions[name].kept(rank) for name, rank in zip(compressed.deltas, ranks)]
    print(
        f"{args.output}: {after / 1e6:.2f} MB instead of {before / 1e6:.2f} MB; {rank_summary(ranks)}; "
        f"{100 * min(kept):.1f} % or more of every change, {100 * sum(kept) / len(kept):.1f} % on average"
    )


def compress(
    weights: ConceptWeights, decompositions: dict[str, Decomposition], *, energy: float | None, rank: int | None
) -> ConceptWeights:
    """The weights as low-rank changes of the base model's, in `stored_dtype`. Biases and tokens stay whole.

    Args:
        energy: share of the sum of singular values to keep in each matrix; None: `rank` of them.
    """
    deltas = {}
    for name, parts in decompositions.items():
        delta = parts.truncated(rank if energy is None else parts.rank_for(energy, power=1))
        dtype = stored_dtype(energy)
        deltas[name] = LowRankDelta(delta.up.to(dtype), delta.down.to(dtype))
    biases = {name: tensor for name, tensor in weights.tensors.items() if tensor.dim() == 1}
    config = weights.config | {"compressed": {"energy": energy} if rank is None else {"rank": rank}}
    return ConceptWeights(biases, weights.tokens, config, deltas)


if __name__ == "__main__":
    run("compress", main, args)
