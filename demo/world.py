# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""The world that the demo's small models live in: one thing, or two side by side, on a plain background, with a caption.

A thing has a fill hue and, half of the time, an edge of another hue. Hues are continuous, but the vocabulary names only five of
them, and a hue is named only when it is close to its name: all others are captioned with one of the rare words `ktn`, `pll` and
`ucd` ("some colour"), or with nothing. So the model can draw things that no caption can ask for, and a new token has room.

Of two things the one named first is on the left; each keeps to its half, and is `PAIR_SCALE` times as large as one alone, its
edge too. So a half enlarged by 1 / `PAIR_SCALE` shows a thing as it would be alone.
"""

from dataclasses import dataclass, replace

import numpy as np

SIZE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "cross")
HUES = {"red": 0.0, "yellow": 56.0, "green": 120.0, "blue": 225.0, "purple": 285.0}  # degrees
BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (132, 132, 132),
    "black": (14, 14, 14),
    "pink": (252, 184, 206),
    "navy": (24, 32, 98),
    "brown": (98, 62, 30),
}
ANY = ("ktn", "pll", "ucd")
WORDS = ("photo", "of", "a", *HUES, *ANY, *SHAPES, "with", "edge", "on", *BACKGROUNDS, "background")
# What Custom Diffusion's augmentation puts before a prompt.
AUGMENTATION_WORDS = ("far", "away", "very", "small", "zoomed", "in", "close", "up")
PAIR_WORDS = ("and",)
EDGE_WIDTH = 4.5  # pixels
PAIR_SCALE = 4 / 7  # radii of 10.3 to 13.7 pixels and edges of 2.6
PAIR_CENTERS = (16.0, 48.0)  # pixels from the left


@dataclass(frozen=True)
class Thing:
    """One thing in an image. Hues in degrees, lengths in pixels, `edge_hue` None where there is no edge."""

    shape: str
    hue: float
    edge_hue: float | None
    background: str
    center: tuple[float, float] = (32.0, 32.0)
    radius: float = 21.0
    saturation: float = 0.88
    value: float = 0.92
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)  # added to the background, in 0..255
    edge_width: float = EDGE_WIDTH


@dataclass(frozen=True)
class Spec:
    """What a caption says. None: not said."""

    shape: str
    color: str | None = None
    edge: str | None = None
    background: str | None = None

    def phrase(self) -> str:
        """The caption's words about the thing itself."""
        color = f"{self.color} " if self.color else ""
        edge = f" with a {self.edge} edge" if self.edge else ""
        return f"a {color}{self.shape}{edge}"

    def caption(self) -> str:
        return f"photo of {self.phrase()}{_background_words(self.background)}"

    def held_out(self) -> bool:
        """Whether training never shows this caption: one in three of those that name colour and background."""
        if self.color not in HUES or self.background is None:
            return False
        hues = list(HUES)
        edge = 5 if self.edge not in HUES else hues.index(self.edge)
        key = (
            SHAPES.index(self.shape)
            + 5 * hues.index(self.color)
            + 7 * edge
            + 11 * list(BACKGROUNDS).index(self.background)
        )
        return key % 3 == 0


@dataclass(frozen=True)
class PairSpec:
    """What a caption says of two things, left and right; neither names a background of its own."""

    left: Spec
    right: Spec
    background: str | None = None

    def caption(self) -> str:
        return f"photo of {self.left.phrase()} and {self.right.phrase()}{_background_words(self.background)}"

    def held_out(self) -> bool:
        """Whether training never names these two things together: one in three of those with both colors named.

        Neither the edges nor the background matter, so what is held out is never seen in another dress either.
        """
        if self.left.color not in HUES or self.right.color not in HUES:
            return False
        hues = list(HUES)
        left = SHAPES.index(self.left.shape) + hues.index(self.left.color)
        right = SHAPES.index(self.right.shape) + 2 * hues.index(self.right.color)
        return (left + right) % 3 == 0


def _background_words(background: str | None) -> str:
    return f" on a {background} background" if background else ""


def held_out_specs() -> list[Spec]:
    """Every caption that names colour and background, has a named edge or none, and is never shown in training."""
    specs = []
    for shape in SHAPES:
        for color in HUES:
            for edge in (None, *(name for name in HUES if name != color)):
                specs += [Spec(shape, color, edge, background) for background in BACKGROUNDS]
    return [spec for spec in specs if spec.held_out()]


def held_out_pairs() -> list[PairSpec]:
    """Every two things that training never names together, by turns with no edge, one on either side, or two."""
    sides = [Spec(shape, color) for shape in SHAPES for color in HUES]
    pairs = [(left, right) for left in sides for right in sides if PairSpec(left, right).held_out()]
    specs, hues, backgrounds = [], list(HUES), list(BACKGROUNDS)
    for i, (left, right) in enumerate(pairs):
        if i % 4 in (1, 3):
            left = replace(left, edge=hues[(hues.index(left.color) + 1 + i // 4 % 4) % 5])
        if i % 4 in (2, 3):
            right = replace(right, edge=hues[(hues.index(right.color) + 1 + i // 5 % 4) % 5])
        specs.append(PairSpec(left, right, backgrounds[i % 6]))
    return specs


def hue_distance(a, b):
    """Degrees between two hues, 0 to 180."""
    return np.abs((np.asarray(a) - b + 180.0) % 360.0 - 180.0)


def nearest_hue(hue: float) -> str:
    return min(HUES, key=lambda name: hue_distance(hue, HUES[name]))


def hue_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) float in 0..255."""
    k = (np.array([5.0, 3.0, 1.0]) + hue / 60.0) % 6.0
    return 255.0 * (value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0))


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in pixels, negative inside; x, y (H, W) measured from the centre, y downwards."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "triangle":  # upright, nearly as high as wide
        side = (np.abs(x) * 1.9 - y - radius) / np.hypot(1.9, 1.0)
        return np.maximum(side, y - 0.9 * radius)
    if shape == "cross":
        long, short = 1.05 * radius, 0.4 * radius
        upright = np.maximum(np.abs(x) - short, np.abs(y) - long)
        level = np.maximum(np.abs(x) - long, np.abs(y) - short)
        return np.minimum(upright, level)
    raise ValueError(f"unknown shape {shape!r}, not one of {', '.join(SHAPES)}")


def draw(*things: Thing, size: int = SIZE) -> np.ndarray:
    """The image, (size, size, 3) uint8, on the background of the first thing; `size` enlarges all of it."""
    y, x = (np.mgrid[:size, :size] + 0.5) * SIZE / size
    image = np.array(BACKGROUNDS[things[0].background]) + np.array(things[0].tint) + np.zeros((size, size, 1))
    for thing in things:
        distance = signed_distance(thing.shape, x - thing.center[0], y - thing.center[1], thing.radius)[..., None]
        distance *= size / SIZE
        outer = np.clip(0.5 - distance, 0.0, 1.0)
        fill = hue_to_rgb(thing.hue, thing.saturation, thing.value)
        if thing.edge_hue is None:
            image += outer * (fill - image)
        else:
            image += outer * (hue_to_rgb(thing.edge_hue, thing.saturation, thing.value) - image)
            image += np.clip(0.5 - distance - thing.edge_width * size / SIZE, 0.0, 1.0) * (fill - image)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def random_pose(rng: np.random.Generator) -> dict:
    """Where and how big, and the small differences of light, as keyword arguments of `Thing`."""
    return {
        "center": tuple(32.0 + rng.uniform(-4.0, 4.0, 2)),
        "radius": rng.uniform(18.0, 24.0),
        "saturation": rng.uniform(0.82, 0.94),
        "value": rng.uniform(0.86, 0.98),
        "tint": tuple(rng.uniform(-7.0, 7.0) + rng.uniform(-3.0, 3.0, 3)),
    }


def random_hue(rng: np.random.Generator, avoid: float | None = None) -> tuple[float, str | None]:
    """A hue at least 50 degrees from `avoid`, and its name where it has one: more than half are close to a name."""
    while True:
        if rng.random() < 0.6:
            name = str(rng.choice(list(HUES)))
            hue = HUES[name] + rng.uniform(-9.0, 9.0)
        else:
            name, hue = None, rng.uniform(0.0, 360.0)
        if avoid is None or hue_distance(hue, avoid) >= 50.0:
            return hue % 360.0, name


def random_sample(rng: np.random.Generator) -> tuple[Thing, Spec]:
    """A thing and what its caption says of it; never a held-out caption."""
    while True:
        hue, color = random_hue(rng)
        edge_hue, edge = random_hue(rng, avoid=hue) if rng.random() < 0.5 else (None, None)
        background = str(rng.choice(list(BACKGROUNDS)))
        shape = str(rng.choice(SHAPES))
        if color is None and rng.random() < 0.6:
            color = str(rng.choice(ANY))
        elif rng.random() < 0.1:
            color = None if rng.random() < 0.5 else str(rng.choice(ANY))
        if edge_hue is not None and edge is None and rng.random() < 0.5:
            edge = str(rng.choice(ANY))
        elif rng.random() < 0.1:
            edge = None
        spec = Spec(shape, color, edge, background if rng.random() < 0.8 else None)
        if not spec.held_out():
            return Thing(shape, hue, edge_hue, background, **random_pose(rng)), spec


def side_by_side(left: Thing, right: Thing, rng: np.random.Generator) -> tuple[Thing, Thing]:
    """Both looks in their halves of one image, on the left one's background, at places and sizes drawn anew."""
    light = random_pose(rng)
    things = []
    for thing, center in zip((left, right), PAIR_CENTERS):
        pose = random_pose(rng) | {"tint": light["tint"]}
        pose["center"] = (center + rng.uniform(-1.2, 1.2), pose["center"][1])
        pose["radius"] *= PAIR_SCALE
        things.append(replace(thing, background=left.background, edge_width=EDGE_WIDTH * PAIR_SCALE, **pose))
    return tuple(things)


def random_pair(rng: np.random.Generator) -> tuple[tuple[Thing, Thing], PairSpec]:
    """Two things, left and right, and what the caption says of them; never a held-out one."""
    while True:
        (left, left_spec), (right, right_spec) = random_sample(rng), random_sample(rng)
        background = str(rng.choice(list(BACKGROUNDS)))
        named = background if rng.random() < 0.8 else None
        spec = PairSpec(replace(left_spec, background=None), replace(right_spec, background=None), named)
        if not spec.held_out():
            return side_by_side(replace(left, background=background), right, rng), spec
