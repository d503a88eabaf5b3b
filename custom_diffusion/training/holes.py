"""Holes: the part of an image that an inpainting model is asked to paint, drawn at random for each sample."""

import numpy as np
import torch

WHOLE_IMAGE = (
    0.25  # share of the samples in which everything is to be painted, as when such a model is drawn from text alone
)


def draw_hole(rng: np.random.Generator, size: int) -> torch.Tensor:
    """(1, size, size) bool, true where the image is to be painted: everything, or a rectangle or ellipse of any size.

    Source: diffusers' DreamBooth for inpainting models (shapes, their size and place); the model card of Stable Diffusion's
    inpainting model (the share of samples with everything masked).
    """
    whole = rng.random() < WHOLE_IMAGE
    ellipse = rng.random() < 0.5
    width, height = (int(side) for side in rng.integers(1, size + 1, size=2))
    left, top = (int(rng.integers(size - side + 1)) for side in (width, height))
    if whole:
        return torch.ones(1, size, size, dtype=torch.bool)
    hole = torch.zeros(1, size, size, dtype=torch.bool)
    if ellipse:
        rows, columns = torch.meshgrid(_across(height), _across(width), indexing="ij")
        inside = rows.square() + columns.square() <= 1
    else:
        inside = torch.ones(height, width, dtype=torch.bool)
    hole[0, top : top + height, left : left + width] = inside
    return hole


def _across(side):
    """Where the centres of `side` pixels lie between -1 and 1."""
    return (torch.arange(side) + 0.5) / side * 2 - 1
