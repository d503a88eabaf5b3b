"""Weights that do given things to given text features, and change others least: the mathematics of merging."""

from dataclasses import dataclass

import torch

from custom_diffusion.progress import ProgressBar

# Share of the mean eigenvalue. Captions that the merge has not read, of which there are always more, then change less.
RIDGE = 1e-3


@dataclass(frozen=True)
class LayerReport:
    """How well one matrix was merged.

    Attributes:
        residual: largest |W C' - V'| relative to the largest |V'|.
        change: ||(W - W0) C_reg'|| / ||W0 C_reg'||, of the ordinary captions.
        conditioning: of D C' in the paper's notation.
    """

    residual: float
    change: float
    conditioning: float


class Constraints:
    """The text features that all layers share, and what solving with them takes, in float64.

    With C_reg the (n, d) features of ordinary captions and C the (s, d) features of the concepts' words, it holds the
    (s, d) matrix that turns what is missing at the words into the least change of weights: (D C')^-1 D of the paper, whose
    D = C (C_reg' C_reg + ridge I)^-1.

    Args:
        regularisation: C_reg' C_reg, (d, d) float64.
        words: C, (s, d) float64, without equal rows.
        ridge: as a share of the mean eigenvalue of C_reg' C_reg. 0, as in the paper, takes a C_reg of full rank.
    Attributes:
        rank: of C_reg.
    Raises:
        ValueError: more words than dimensions, so that nothing can satisfy all.
    """

    def __init__(self, regularisation: torch.Tensor, words: torch.Tensor, ridge: float = RIDGE):
        if len(words) > words.shape[1]:
            raise ValueError(f"{len(words)} constraints for {words.shape[1]} text features")
        self.words = words
        self.regularisation = regularisation
        eigenvalues = torch.linalg.eigvalsh(regularisation)
        self.rank = int((eigenvalues > 1e-12 * eigenvalues[-1]).sum())
        metric = regularisation + ridge * eigenvalues.mean() * torch.eye(len(regularisation), dtype=torch.float64)
        cholesky = torch.linalg.cholesky(metric)  # L
        # By QR of L^-1 C', as (D C')^-1 D = R^-1 Q' L^-1, which does not square the conditioning.
        q, r = torch.linalg.qr(torch.linalg.solve_triangular(cholesky, words.T, upper=False))  # (d, s), (s, s)
        whitened = torch.linalg.solve_triangular(r, q.T, upper=True)
        self.correction = torch.linalg.solve_triangular(cholesky, whitened, upper=False, left=False)  # (s, d)
        self.conditioning = float(torch.linalg.cond(r)) ** 2  # D C' = R' R

    def merge(self, base: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, LayerReport]:
        """W = W0 + (V' - W0 C') (D C')^-1 D, the closest to W0 on C_reg, but for the ridge, with W C' = V'.

        Args:
            base: W0, (out, d). targets: V, (s, out), what the concepts' words must give.
        Returns:
            W (out, d) float64, and how well it does.
        Source: Custom Diffusion, equations 4-5 and appendix B.
        """
        base, targets = base.double(), targets.double()
        errors = targets.T - base @ self.words.T  # (out, s)
        merged = base + errors @ self.correction
        residual = (merged @ self.words.T - targets.T).abs().max() / targets.abs().max()
        before = (base @ self.regularisation * base).sum()
        moved = (errors @ (self.correction @ self.regularisation @ self.correction.T) * errors).sum() / before
        return merged, LayerReport(float(residual), float(moved.clamp(min=0).sqrt()), self.conditioning)


class Contradiction(ValueError):
    """Two concepts want different things of the same words. `first` and `second` are their numbers, from 0."""

    def __init__(self, first: int, second: int):
        super().__init__(f"concepts {first} and {second} want different things of the same words")
        self.first, self.second = first, second


def distinct_words(words: list[torch.Tensor], parts: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The rows of each concept's words without those that an earlier concept has too, and wants the same of.

    Args:
        words: C of each concept, (s_i, d). parts: each concept's matrices by name, (out, d).
    Raises:
        Contradiction: an earlier concept has such a row, but wants something else of it. Nothing can do both.
    """
    kept = []
    for number, rows in enumerate(words):
        known = {}  # index of a row -> number of the earlier concept that has it
        for earlier, others in enumerate(words[:number]):
            equal = _equal(rows.unsqueeze(1), others.unsqueeze(0)).any(dim=1)
            known |= dict.fromkeys(equal.nonzero().flatten().tolist(), earlier)
        for index, earlier in known.items():
            wanted = [(parts[i][name].double() @ rows[index]) for name in parts[number] for i in (number, earlier)]
            if not all(_equal(own, other) for own, other in zip(wanted[::2], wanted[1::2])):
                raise Contradiction(earlier, number)
        kept.append(rows[[index for index in range(len(rows)) if index not in known]])
    return kept


def _equal(rows, others, tolerance=1e-5):
    """Whether vectors (..., d) differ by no more than float32 rounding."""
    return (rows - others).norm(dim=-1) <= tolerance * others.norm(dim=-1)


def drop_equal_rows(rows: torch.Tensor) -> torch.Tensor:
    """(s, d) -> those rows that differ from every earlier one by more than float32 rounding."""
    kept = []
    for row in rows:
        if not any(_equal(row, other) for other in kept):
            kept.append(row)
    return torch.stack(kept)


def merge_layers(
    constraints: Constraints,
    words: list[torch.Tensor],
    parts: list[dict[str, torch.Tensor]],
    base: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, LayerReport]]:
    """Merge every matrix.

    Args:
        words: C of each part, (s_i, d). parts: each part's matrices by name. base: the base model's.
    Returns:
        The merged matrices, float32, and the reports, by name.
    """
    tensors, reports = {}, {}
    for name in ProgressBar(base, desc="Merging", unit="matrix"):
        targets = torch.cat([rows @ part[name].double().T for rows, part in zip(words, parts)])  # V: (s, out)
        merged, reports[name] = constraints.merge(base[name], targets)
        tensors[name] = merged.float()
    return tensors, reports
