"""What training changed in each weight matrix, and how few numbers say nearly the same."""

from dataclasses import dataclass
from statistics import median_high

import torch

from custom_diffusion.errors import warn
from custom_diffusion.progress import ProgressBar
from custom_diffusion.weights.format import ConceptWeights, LowRankDelta

# Of the base model's weights, trained ones hold all, whatever was added to them; of any other model's, next to nothing.
MIN_SHARE = 0.5


@dataclass(frozen=True)
class Decomposition:
    """Singular values of a change (out, in): left (out, k) diag(values) right (k, in), largest first, k = min(out, in)."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    def rank_for(self, share: float, power: int) -> int:
        """The smallest rank, 1 or more, whose values to the `power` add up to `share` of all."""
        if share >= 1:
            return len(self.values)
        parts = (self.values.double() ** power).cumsum(0)
        return int((parts < share * parts[-1]).sum()) + 1

    def truncated(self, rank: int) -> LowRankDelta:
        """The nearest change of this rank, or of all there is; both factors share the scale, so that half precision suits both."""
        scale = self.values[:rank].sqrt()
        return LowRankDelta(self.left[:, :rank] * scale, scale[:, None] * self.right[:rank])

    def kept(self, rank: int) -> float:
        """Share of the squared values that a rank keeps."""
        total = self.values.double().square().sum()
        return float(self.values[:rank].double().square().sum() / total) if total > 0 else 1.0


def changes(weights: ConceptWeights, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W - W0 of every weight matrix, (out, in) float32. Warns if `base` looks like another model's.

    Args:
        base: the base model's parameters by name, float32.
    """
    deltas = {n: tensor.float() - base[n] for n, tensor in weights.tensors.items() if tensor.dim() == 2}
    deltas |= {name: delta.matrix() for name, delta in weights.deltas.items()}
    trained = torch.cat([(base[name] + delta).flatten() for name, delta in deltas.items()])
    before = torch.cat([base[name].flatten() for name in deltas])
    # Not the angle between them: a merge may add far more than was there, if in a few directions.
    share = (trained @ before / (before @ before)).item()
    if share < MIN_SHARE:
        warn(f"the weights hold {100 * share:.0f} % of the base model's; is it the right --model?")
    return deltas


def decompose(deltas: dict[str, torch.Tensor]) -> dict[str, Decomposition]:
    """Singular value decomposition of every change."""
    return {
        name: Decomposition(*torch.linalg.svd(delta, full_matrices=False))
        for name, delta in ProgressBar(deltas.items(), desc="Decomposing", unit="matrix")
    }


def full_tensors(weights: ConceptWeights, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every parameter that the weights bring, whole, float32."""
    whole = {name: base[name] + delta.matrix() for name, delta in weights.deltas.items()}
    return {name: tensor.float() for name, tensor in weights.tensors.items()} | whole


def stored_dtype(share: float | None) -> torch.dtype:
    """Half precision changes a delta by 3e-4 of itself: far less than leaving out singular values does, if any are."""
    return torch.float32 if share == 1 else torch.float16


def rank_summary(ranks: list[int]) -> str:
    """For example "ranks 3 to 17, median 8"."""
    if min(ranks) == max(ranks):
        return f"rank {ranks[0]}"
    return f"ranks {min(ranks)} to {max(ranks)}, median {median_high(ranks)}"
