"""Compress trained weights: keep only the strongest part of what training changed.

  custom-diffusion compress cat --output cat-small

Of every matrix's change from the base model the leading singular values are kept, up to a share of their sum (Custom Diffusion,
section 3.3 and appendix). The result is loaded by load_custom_diffusion like any trained folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from custom_diffusion.cli.tool_flags import (
    add_model_flags,
    check_output_folder,
    model_problems,
    output_folder_problems,
    weights_problems,
)
from custom_diffusion.files import whole_folder

if TYPE_CHECKING:
    from custom_diffusion.weights.format import ConceptWeights
    from custom_diffusion.weights.low_rank import Decomposition

DEFAULT_ENERGY = 0.6  # the paper's


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help="trained folder or Hub id")
    parser.add_argument("--output", required=True, help="folder to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--energy", type=float, help=f"share of the sum of singular values to keep (default: {DEFAULT_ENERGY})"
    )
    size.add_argument("--rank", type=int, help="or the number of singular values to keep, the same in every matrix")
    add_model_flags(parser)


def flag_problems(args: argparse.Namespace) -> list[str]:
    problems = weights_problems("weights", args.weights) + model_problems(args) + output_folder_problems(args.output)
    if args.energy is not None and not 0 < args.energy <= 1:
        problems.append(f"--energy: {args.energy} must be above 0 and at most 1")
    if args.rank is not None and args.rank < 1:
        problems.append(f"--rank: {args.rank} must be 1 or more")
    return problems


def main(args: argparse.Namespace) -> None:
    """Compress, and say what is left."""
    flags = {name: value for name, value in vars(args).items() if name != "tool"}
    print(compress(flags.pop("weights"), **flags))


def compress(
    weights: ConceptWeights | str | Path,
    *,
    output: str | Path,
    energy: float | None = None,
    rank: int | None = None,
    model: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config_from: str | None = None,
) -> str:
    """Write the weights as low-rank changes of the base model's.

    Args:
        weights: trained folder, Hub id, or weights already read.
        output: folder to write.
        energy: share of the sum of singular values to keep in each matrix, 0.6 if neither is given; or rank: how many.
        model, revision, variant: the base model, by default the one that the weights name.
        config_from: folder or Hub id that has the configuration and tokenizers of a base model in one file.
    Returns:
        A line that says how small they are, and how much was kept.
    Raises:
        InputError: the weights or the model cannot be used, or the output folder holds something.
    """
    from custom_diffusion.model.loading import base_tensors, empty_unet_for
    from custom_diffusion.model.source import base_of
    from custom_diffusion.weights.format import as_weights, write_weights
    from custom_diffusion.weights.low_rank import decompositions

    check_output_folder(output)
    if energy is None and rank is None:
        energy = DEFAULT_ENERGY
    weights = as_weights(weights)
    source = base_of(weights.config, model, revision, variant, config_from)
    unet = empty_unet_for(weights, source)
    parts = decompositions(weights, base_tensors(source, weights.shapes()))
    small, kept = low_rank_weights(weights, parts, energy=energy, rank=rank)
    # A different --model is what the deltas are now relative to.
    small.config |= source.recorded()
    with whole_folder(Path(output)) as folder:
        write_weights(folder, small, unet, ("safetensors",))
        after = sum(path.stat().st_size for path in folder.iterdir())
    before = 4 * sum(shape.numel() for shape in weights.shapes().values())
    return f"{output}: {after / 1e6:.2f} MB instead of {before / 1e6:.2f} MB; {what_is_left(small, kept)}"


def what_is_left(small: ConceptWeights, kept: list[float]) -> str:
    """The ranks, and what they keep of each matrix's change."""
    from custom_diffusion.weights.low_rank import rank_summary

    ranks = [delta.up.shape[1] for delta in small.deltas.values()]
    lines = [rank_summary(ranks)] if ranks else []
    if whole := len(kept) - len(ranks):
        lines.append(f"{whole} of {len(kept)} matrices whole, as their factors would be no smaller")
    lines.append(f"{100 * min(kept):.1f} % or more of every change, {100 * sum(kept) / len(kept):.1f} % on average")
    return "; ".join(lines)


def low_rank_weights(
    weights: ConceptWeights,
    decompositions: Iterable[tuple[str, Decomposition]],
    *,
    energy: float | None,
    rank: int | None,
) -> tuple[ConceptWeights, list[float]]:
    """The weights as low-rank changes of the base model's, in `stored_dtype`.

    Biases and tokens stay as they are, and so does a matrix, or a change that was compressed before, which the factors would not
    make smaller.

    Args:
        decompositions: of each matrix's change, by name; used up.
        energy: share of the sum of singular values to keep in each matrix; None: `rank` of them.
    Returns:
        The weights, and what is kept of the squared values of each change; all of it where a matrix stays whole.
    """
    from custom_diffusion.weights.format import LowRankDelta
    from custom_diffusion.weights.low_rank import stored_dtype

    dtype = stored_dtype(energy)
    tensors, deltas, kept = dict(weights.tensors), {}, []
    for name, parts in decompositions:
        factors = parts.truncated(rank if energy is None else parts.rank_for(energy, power=1))
        small = LowRankDelta(factors.up.to(dtype), factors.down.to(dtype))
        if name in weights.deltas:
            before = weights.deltas[name]
            deltas[name] = small if small.num_bytes < before.num_bytes else before
        elif small.num_bytes < tensors[name].nbytes:
            deltas[name] = small
            del tensors[name]
        kept.append(parts.kept(deltas[name].up.shape[1]) if name in deltas else 1.0)
    config = weights.config | {"compressed": {"energy": energy} if rank is None else {"rank": rank}}
    return replace(weights, tensors=tensors, config=config, deltas=deltas), kept
