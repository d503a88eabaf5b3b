"""What training changed in each weight matrix, and how few numbers say nearly the same."""

from collections.abc import Iterator, Mapping
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
        # Contiguous, as files want them: the decomposition itself may come in columns, and would be copied for that later.
        up, down = self.left[:, :rank] * scale, scale[:, None] * self.right[:rank]
        return LowRankDelta(up.contiguous(), down.contiguous())

    def kept(self, rank: int) -> float:
        """Share of the squared values that a rank keeps."""
        total = self.values.double().square().sum()
        return float(self.values[:rank].double().square().sum() / total) if total > 0 else 1.0


def changes(weights: ConceptWeights, base: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, W - W0) of every weight matrix, (out, in) float32, one at a time. Warns if `base` looks like another model's.

    Args:
        base: the base model's parameters by name, float32.
    """
    names = [name for name, shape in weights.shapes().items() if len(shape) == 2]
    _warn_of_another_model(weights, base, names)
    for name in names:
        yield name, _change(weights, base, name)


def _change(weights, base, name):
    return weights.deltas[name].matrix() if name in weights.deltas else weights.tensors[name].float() - base[name]


def _warn_of_another_model(weights, base, names):
    # Not the angle between them: a merge may add far more than was there, if in a few directions.
    alike, before = 0.0, 0.0
    for name in names:
        trained, own = (base[name] + _change(weights, base, name)).flatten(), base[name].flatten()
        alike += (trained @ own).item()
        before += (own @ own).item()
    if alike < MIN_SHARE * before:
        warn(f"the weights hold {100 * alike / before:.0f} % of the base model's; is it the right --model?")


def decompose(change: torch.Tensor) -> Decomposition:
    """Singular value decomposition of a change (out, in)."""
    return Decomposition(*torch.linalg.svd(change, full_matrices=False))


def decompositions(weights: ConceptWeights, base: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Decomposition]]:
    """(name, `decompose`) of every matrix's change, one at a time: together they would be larger than the weights themselves."""
    count = sum(len(shape) == 2 for shape in weights.shapes().values())
    for name, change in ProgressBar(changes(weights, base), total=count, desc="Decomposing", unit="matrix"):
        yield name, decompose(change)


def full_tensors(weights: ConceptWeights, base: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
