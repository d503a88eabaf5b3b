# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Says what is seen in a picture of the world, by measuring it: no learned part."""

from dataclasses import dataclass

import numpy as np
import torch
import world

FOREGROUND_DISTANCE = 48.0  # RGB distance from the background, of 441
TEMPLATE = 32  # side of the shape templates, in cells


@dataclass(frozen=True)
class Seen:
    """What the judge sees. `edge_hue` is None where no edge of another hue is found, `hue` where nothing is found at all."""

    background: str
    shape: str | None
    hue: float | None
    edge_hue: float | None

    @property
    def color(self) -> str | None:
        return None if self.hue is None else world.nearest_hue(self.hue)

    @property
    def edge(self) -> str | None:
        return None if self.edge_hue is None else world.nearest_hue(self.edge_hue)


def rgb_to_hue(rgb: np.ndarray) -> float:
    """Degrees."""
    red, green, blue = (float(c) for c in rgb)
    return float(np.degrees(np.arctan2(np.sqrt(3.0) * (green - blue), 2.0 * red - green - blue)) % 360.0)


def eroded(mask: np.ndarray, pixels: int) -> np.ndarray:
    """`mask` (H, W) bool less a border of so many pixels."""
    for _ in range(pixels):
        mask = np.pad(mask, 1, mode="edge")
        mask = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return mask


def opened(mask: np.ndarray) -> np.ndarray:
    """`mask` (H, W) bool without specks: what a border of two pixels takes away wholly is gone."""
    return ~eroded(~eroded(mask, 2), 2)


def boxed(mask: np.ndarray) -> np.ndarray:
    """The content of the bounding box of `mask` (H, W), as (TEMPLATE, TEMPLATE) bool."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    steps = (np.arange(TEMPLATE) + 0.5) / TEMPLATE
    y = rows[0] + steps * (rows[-1] + 1 - rows[0])
    x = columns[0] + steps * (columns[-1] + 1 - columns[0])
    return mask[np.ix_(y.astype(int), x.astype(int))]


def _templates() -> dict[str, np.ndarray]:
    y, x = np.mgrid[: world.SIZE, : world.SIZE] + 0.5 - world.SIZE / 2
    return {shape: boxed(world.signed_distance(shape, x, y, 24.0) < 0) for shape in world.SHAPES}


TEMPLATES = _templates()


def foreground(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The background's colour (3,) and the mask (H, W) of what differs from it, less specks."""
    frame = [image[:2], image[-2:], image[:, :2], image[:, -2:]]
    ground = np.median(np.concatenate([side.reshape(-1, 3) for side in frame]).astype(float), axis=0)
    return ground, opened(np.linalg.norm(image.astype(float) - ground, axis=-1) > FOREGROUND_DISTANCE)


def see(image: np.ndarray) -> Seen:
    """Background by the frame, hues by medians over the inside and the rim, shape by the best overlap with a template.

    Args:
        image: (64, 64, 3) uint8.
    """
    ground, mask = foreground(image)
    background = min(world.BACKGROUNDS, key=lambda name: np.linalg.norm(ground - world.BACKGROUNDS[name]))
    inside = eroded(mask, 6)
    if inside.sum() < 20:
        return Seen(background, None, None, None)
    fill = np.median(image[inside], axis=0)
    rim = np.median(image[eroded(mask, 1) & ~eroded(mask, 4)], axis=0)
    hue, rim_hue = rgb_to_hue(fill), rgb_to_hue(rim)
    edge_hue = rim_hue if world.hue_distance(hue, rim_hue) > 25.0 else None
    box = boxed(mask)
    overlap = {shape: (box & t).sum() / (box | t).sum() for shape, t in TEMPLATES.items()}
    shape = max(overlap, key=overlap.get)
    return Seen(background, shape if overlap[shape] > 0.75 else None, hue, edge_hue)


def check_caption(seen: Seen, spec: world.Spec) -> dict[str, bool]:
    """What the caption asks for and whether it is there. A named edge must be there; without one, any edge is right."""
    right = {"shape": seen.shape == spec.shape}
    if spec.color in world.HUES:
        right["color"] = seen.color == spec.color
    if spec.edge in world.HUES:
        right["edge"] = seen.edge == spec.edge
    if spec.background:
        right["background"] = seen.background == spec.background
    return right


def generate(
    pipeline, prompts: list[str], seed: int, num_inference_steps: int = 20, guidance_scale: float = 3.0
) -> np.ndarray:
    """(len(prompts), 64, 64, 3) uint8; picture i depends on prompt i and (seed, i) alone."""
    images = []
    for i in range(0, len(prompts), 50):
        batch = prompts[i : i + 50]
        generators = [torch.Generator().manual_seed(seed * 100_003 + i + j) for j in range(len(batch))]
        images += pipeline(
            batch,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
            height=world.SIZE,
            width=world.SIZE,
            output_type="np",
        ).images.tolist()
    return np.rint(np.array(images) * 255).astype(np.uint8)


def score_captions(pipeline, specs: list[world.Spec], seed: int) -> dict[str, float]:
    """Share of captions, in percent, whose colour, edge, background and shape come out as asked."""
    images = generate(pipeline, [spec.caption() for spec in specs], seed)
    checks = [check_caption(see(image), spec) for image, spec in zip(images, specs)]
    return {
        key: round(100 * float(np.mean([check[key] for check in checks if key in check])), 1)
        for key in ("color", "edge", "background", "shape")
    }
