# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Says what is seen in an image of the world, by measuring it: no learned part.

`likeness` is the one measure of how much a thing looks like what was wanted, and `pair_fates` says it of two things side by side.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import world
from colors import closeness, is_named, oklab

FOREGROUND_DISTANCE = 48.0  # RGB distance from the background, of 441
EDGE_DISTANCE = 0.08  # OKLab distance of an edge from the fill; less is the decoder's blur
TEMPLATE = 32  # side of the shape templates, in cells
SECTORS = 16  # of the rim, and of what is inside it
MOST = 0.75  # of a rim or an inside that has to be as a caption says


@dataclass(frozen=True)
class Seen:
    """What the judge sees of one thing.

    Attributes:
        shape: None where it is none of the world's.
        hue: degrees, of the inside; None where nothing is found.
        fill, rim: median colours in OKLab of the inside's and of the rim's sectors, (up to SECTORS, 3).
    """

    background: str
    shape: str | None = None
    hue: float | None = None
    fill: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))
    rim: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))

    @property
    def edged(self) -> np.ndarray:
        """Which sectors of the rim have another colour than the inside, bool."""
        return np.linalg.norm(self.rim - np.median(self.fill, axis=0), axis=-1) > EDGE_DISTANCE

    @property
    def color(self) -> str | None:
        """The named colour that most of the inside has."""
        return next((name for name in world.HUES if _share(is_named(self.fill, name)) >= MOST), None)

    @property
    def edge(self) -> str | None:
        """The named colour that most of the rim has, if the inside has another."""
        return next((name for name in world.HUES if _share(self.edged & is_named(self.rim, name)) >= MOST), None)


def _share(there: np.ndarray) -> float:
    return float(there.mean()) if there.size else 0.0


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


def depth(mask: np.ndarray) -> np.ndarray:
    """Distance (H, W) in pixels of what is in `mask` from the nearest pixel that is not, 0 for that."""
    nearest = np.zeros(mask.shape)
    here, border = np.argwhere(mask), np.argwhere(~mask & ~eroded(~mask, 1))
    squares = (here**2).sum(1)[:, None] + (border**2).sum(1) - 2 * (here.astype(float) @ border.T)
    nearest[mask] = np.sqrt(squares.min(1))
    return nearest


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


def connected(mask: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The parts of `mask` (H, W) bool that pixels of `start` (H, W) bool belong to."""
    part = start & mask
    while (grown := ~eroded(~part, 1) & mask).sum() > part.sum():
        part = grown
    return part


def foreground(image: np.ndarray) -> tuple[str, np.ndarray]:
    """The background's name and the mask (H, W) of what differs from it or lies within what does, less specks."""
    frame = [image[:2], image[-2:], image[:, :2], image[:, -2:]]
    ground = np.median(np.concatenate([side.reshape(-1, 3) for side in frame]).astype(float), axis=0)
    name = min(world.BACKGROUNDS, key=lambda name: np.linalg.norm(ground - world.BACKGROUNDS[name]))
    differs = np.linalg.norm(image.astype(float) - ground, axis=-1) > FOREGROUND_DISTANCE
    # Where red meets green there is a line of grey: on a grey background it would cut off the edge.
    around = np.ones_like(differs)
    around[1:-1, 1:-1] = False
    return name, opened(~connected(~differs, around))


def sector_colors(lab: np.ndarray, where: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Median colours (up to SECTORS, 3) of the pixels `where` (H, W), by direction as seen from `center` (y, x)."""
    y, x = np.nonzero(where)
    sectors = ((np.arctan2(y - center[0], x - center[1]) / (2 * np.pi) + 0.5) * SECTORS).astype(int) % SECTORS
    medians = [
        np.median(lab[y[sectors == i], x[sectors == i]], axis=0) for i in range(SECTORS) if (sectors == i).sum() > 2
    ]
    return np.array(medians).reshape(-1, 3)


def see_thing(image: np.ndarray, mask: np.ndarray, background: str) -> Seen:
    """Colours by medians over sectors of the inside and the rim, shape by the best overlap of `mask` (H, W) with a template."""
    if mask.sum() < 60:
        return Seen(background)
    box = boxed(mask)
    radius = 0.25 * (mask.any(0).sum() + mask.any(1).sum())
    from_outline = depth(mask)
    inside = from_outline > 0.3 * radius
    if inside.sum() < 20:
        return Seen(background)
    rim = (from_outline > 1) & (from_outline <= max(2.0, 0.2 * radius))
    lab, center = oklab(image), np.argwhere(mask).mean(0)
    overlap = {shape: (box & t).sum() / (box | t).sum() for shape, t in TEMPLATES.items()}
    shape = max(overlap, key=overlap.get)
    return Seen(
        background,
        shape if overlap[shape] > 0.75 else None,
        rgb_to_hue(np.median(image[inside], axis=0)),
        sector_colors(lab, inside, center),
        sector_colors(lab, rim, center),
    )


def see(image: np.ndarray) -> Seen:
    """The background by the frame, and the thing before it.

    Args:
        image: (64, 64, 3) uint8.
    """
    background, mask = foreground(image)
    return see_thing(image, mask, background)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of `mask` (H, W) bool, the largest first."""
    parts = []
    while mask.any():
        parts.append(connected(mask, np.arange(mask.size).reshape(mask.shape) == mask.argmax()))
        mask = mask & ~parts[-1]
    return sorted(parts, key=np.sum, reverse=True)


def see_pair(image: np.ndarray) -> tuple[Seen, Seen]:
    """The left thing and the right one, wherever they are; of a single one, what lies in the half where it is not is empty.

    Args:
        image: (64, 64, 3) uint8.
    """
    background, mask = foreground(image)
    parts = [part for part in components(mask) if part.sum() >= 60][:2]
    if len(parts) == 1:
        parts = _cut(parts[0])
    parts.sort(key=lambda part: np.nonzero(part)[1].mean())
    if len(parts) == 1:
        empty = np.zeros_like(mask)
        parts.insert(1 if np.nonzero(parts[0])[1].mean() < world.SIZE / 2 else 0, empty)
    if not parts:
        return Seen(background), Seen(background)
    left, right = parts
    return see_thing(image, left, background), see_thing(image, right, background)


def _cut(mask: np.ndarray) -> list[np.ndarray]:
    """Two things that touch, apart at the column with the least of them; one thing as it is."""
    columns = np.flatnonzero(mask.any(0))
    if len(columns) < 1.5 * mask.any(1).sum():
        return [mask]
    third = len(columns) // 3
    cut = columns[third + int(mask.sum(0)[columns[third:-third]].argmin())]
    right = np.arange(mask.shape[1]) >= cut
    return [mask & ~right, mask & right]


def fill_likeness(seen: Seen, wanted: world.Thing | world.Spec) -> float:
    """0 to 1: how much of the inside has the wanted colour, and how closely."""
    if isinstance(wanted, world.Thing):
        return _share(closeness(seen.fill, wanted.hue))
    return _share(is_named(seen.fill, wanted.color)) if wanted.color in world.HUES else float(seen.hue is not None)


def rim_likeness(seen: Seen, wanted: world.Thing | world.Spec) -> float:
    """0 to 1: how much of the rim has the wanted colour, and how closely. Where a caption names no edge, any is right."""
    if isinstance(wanted, world.Thing):
        return _share(closeness(seen.rim, wanted.hue if wanted.edge_hue is None else wanted.edge_hue))
    return _share(seen.edged & is_named(seen.rim, wanted.edge)) if wanted.edge in world.HUES else 1.0


def likeness(seen: Seen, wanted: world.Thing | world.Spec) -> float:
    """0 to 1: that of the fill or of the rim, whichever is worse; 0 if it has another shape."""
    return min(fill_likeness(seen, wanted), rim_likeness(seen, wanted)) if seen.shape == wanted.shape else 0.0


def pair_score(
    image: np.ndarray, left: world.Thing | world.Spec, right: world.Thing | world.Spec
) -> tuple[tuple[float, str], tuple[float, str]]:
    """Likeness of the left thing and of the right one, 0 to 1, each with its fate.

    A thing is "kept" (likeness of a half or more), else "swapped" (it has the other one's shape, fill or edge instead of its own),
    else "lost" (it is not there, or looks like neither).
    """
    seen = see_pair(image)
    return _fate(seen[0], left, right), _fate(seen[1], right, left)


def _fate(seen: Seen, own: world.Thing | world.Spec, other: world.Thing | world.Spec) -> tuple[float, str]:
    alike = likeness(seen, own)
    if alike >= 0.5:
        return alike, "kept"
    has_shape = seen.shape == other.shape != own.shape
    # What the other one is not said to have cannot be taken from it.
    has_fill = _fill(other) and fill_likeness(seen, other) >= 0.5 > fill_likeness(seen, own)
    has_edge = _edge(other) and rim_likeness(seen, other) >= 0.5 > rim_likeness(seen, own)
    return alike, "swapped" if has_shape or has_fill or has_edge else "lost"


def _fill(wanted: world.Thing | world.Spec) -> bool:
    return isinstance(wanted, world.Thing) or wanted.color in world.HUES


def _edge(wanted: world.Thing | world.Spec) -> bool:
    return wanted.edge_hue is not None if isinstance(wanted, world.Thing) else wanted.edge in world.HUES


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
    """(len(prompts), 64, 64, 3) uint8; image i depends on prompt i and (seed, i) alone."""
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
