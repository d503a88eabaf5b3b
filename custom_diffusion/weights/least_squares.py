"""One matrix that does what several concepts' matrices do, each to its own words: the mathematics of merging."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from custom_diffusion.progress import ProgressBar

# What one ordinary caption weighs against one prompt of a concept. The more, the less do captions change, and the less is
# kept of the concepts (docs/results.md).
CAPTION_WEIGHT = 0.1
# Share of the mean eigenvalue. Prompts that the merge has not read, of which there are always more, then change less.
RIDGE = 1e-3


@dataclass(frozen=True)
class LayerReport:
    """How well one matrix was merged.

    Attributes:
        lost: of each concept's trained change, in prompts that the merge was not fitted to: ||(W - Wp) C'|| / ||(Wp - W0) C'||.
            0 does what training did, 1 is no nearer to that than the base model.
        change: ||(W - W0) C_reg'|| / ||W0 C_reg'||, of the ordinary captions.
        trained_change: the largest such change that one of the concepts' own matrices makes.
    """

    lost: tuple[float, ...]
    change: float
    trained_change: float


class LeastSquares:
    """The part of any text feature that is each concept's, which is the same for every matrix.

    With Wp the matrix of concept p, and c its text features, it is the minimum over W of

        sum over p of the mean of ||(W - Wp) c||^2 + caption_weight x the mean of ||(W - W0) c_reg||^2 + a ridge,

    which is W = W0 + sum over p of (Wp - W0) Mp K^-1, with the second moments Mp = mean of c c' and K = sum over p of Mp +
    caption_weight x the mean of c_reg c_reg' + ridge x I. The paper's equations 4 and 5 ask the first term to be 0, for a
    handful of c; it is then as large as it will in all other sentences about the concept.

    Args:
        concepts: Mp of each concept's prompts, (d, d) float64.
        captions: the same of ordinary captions.
        ridge: as a share of K's mean eigenvalue.
    Attributes:
        shares: Mp K^-1 of each concept, (d, d) float64.
    """

    def __init__(
        self,
        concepts: list[torch.Tensor],
        captions: torch.Tensor,
        caption_weight: float = CAPTION_WEIGHT,
        ridge: float = RIDGE,
    ):
        together = sum(concepts) + caption_weight * captions
        together.diagonal().add_(ridge * together.trace() / len(together))
        cholesky = torch.linalg.cholesky(together)
        self.shares = [torch.cholesky_solve(moments, cholesky).T for moments in concepts]

    def merge(self, base: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        """W, (out, d), of W0 and each concept's Wp."""
        return base + sum((part - base) @ share.to(base.dtype) for part, share in zip(parts, self.shares))


def report(
    merged: torch.Tensor,
    base: torch.Tensor,
    parts: list[torch.Tensor],
    held_out: list[torch.Tensor],
    captions: torch.Tensor,
) -> LayerReport:
    """How well W does.

    Args:
        merged, base: W and W0, (out, d). parts: Wp of each concept.
        held_out: (d, d) moments of each concept's prompts that W was not fitted to. captions: of ordinary captions.
    """
    lost = [
        _ratio(_norm(merged - part, moments), _norm(part - base, moments)) for part, moments in zip(parts, held_out)
    ]
    before = _norm(base, captions)
    changes = [_ratio(_norm(matrix - base, captions), before) for matrix in (merged, *parts)]
    return LayerReport(tuple(lost), changes[0], max(changes[1:]))


def _norm(matrix, moments):
    """||matrix C'|| of (out, d), with the moments C' C."""
    return (matrix @ moments.to(matrix.dtype) * matrix).sum().clamp(min=0).sqrt()


def _ratio(norm, of):
    """0 of nothing: what was not trained is not lost."""
    return float(norm / of) if of > 0 else 0.0


class Contradiction(ValueError):
    """Two concepts want different things of the same words. `first` and `second` are their numbers, from 0."""

    def __init__(self, first: int, second: int):
        super().__init__(f"concepts {first} and {second} want different things of the same words")
        self.first, self.second = first, second


def check_contradictions(words: list[torch.Tensor], parts: list[dict[str, torch.Tensor]]) -> None:
    """Raises Contradiction if two concepts have a word in common, but want different things of it: nothing can do both.

    Args:
        words: text features of each concept's words, (s_i, d) float64. parts: each concept's matrices by name, (out, d).
    """
    for second, rows in enumerate(words):
        for first, others in enumerate(words[:second]):
            common = rows[_equal(rows.unsqueeze(1), others.unsqueeze(0)).any(dim=1)]
            for name, matrix in parts[second].items():
                if not _equal(common @ matrix.double().T, common @ parts[first][name].double().T).all():
                    raise Contradiction(first, second)


def _equal(rows, others, tolerance=1e-5):
    """Whether vectors (..., d) differ by no more than float32 rounding."""
    return (rows - others).norm(dim=-1) <= tolerance * others.norm(dim=-1)


def merge_layers(
    solution: LeastSquares,
    parts: list[dict[str, torch.Tensor]],
    base: Mapping[str, torch.Tensor],
    held_out: list[torch.Tensor],
    captions: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, LayerReport]]:
    """Merge every matrix.

    Args:
        parts: each concept's matrices by name, float32. base: the base model's. held_out, captions: as in `report`.
    Returns:
        The merged matrices, and the reports, by name.
    """
    tensors, reports = {}, {}
    for name in ProgressBar(base, desc="Merging", unit="matrix"):
        matrices = [part[name].float() for part in parts]
        tensors[name] = solution.merge(base[name].float(), matrices)
        reports[name] = report(tensors[name], base[name].float(), matrices, held_out, captions)
    return tensors, reports
