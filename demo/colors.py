# Copyright 2026 The Custom Diffusion trainer authors. Licensed under the Apache License, Version 2.0.
"""Colours as they are perceived: OKLab, in which equal distances look equally far apart, grey and dark colours included."""

import numpy as np
import world

# Distances in OKLab. A hue in the world's different lights stays within NEAR of its mean; the named colours on either side of
# the demo's hues, and every grey, are about FAR from them or more.
NEAR, FAR = 0.05, 0.15
NAMED = 0.09  # from the nearest colour that the world gives the name to

# Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
_TO_CONES = np.array([
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
])  # fmt: skip
_TO_LAB = np.array([
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
])  # fmt: skip


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) in 0..255 to lightness 0..1 and the two opponent axes, (..., 3) float."""
    c = np.asarray(rgb, float) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T


def hue_to_lab(hue: float) -> np.ndarray:
    """A hue of the world in its mean light, (3,)."""
    return oklab(world.hue_to_rgb(hue, 0.88, 0.92))


def closeness(lab: np.ndarray, hue: float) -> np.ndarray:
    """(..., 3) to (...): 1 where it is the colour of that hue, 0 from FAR on."""
    distance = np.linalg.norm(lab - hue_to_lab(hue), axis=-1)
    return np.clip((FAR - distance) / (FAR - NEAR), 0.0, 1.0)


# The world gives a name to hues up to 9 degrees away.
REFERENCES = {
    name: np.stack([hue_to_lab(hue + d) for d in (-9, -6, -3, 0, 3, 6, 9)]) for name, hue in world.HUES.items()
}


def is_named(lab: np.ndarray, name: str) -> np.ndarray:
    """(..., 3) to (...) bool: whether that name fits, and no other fits better."""
    distances = {
        other: np.linalg.norm(lab[..., None, :] - references, axis=-1).min(-1)
        for other, references in REFERENCES.items()
    }
    return (distances[name] < NAMED) & (distances[name] <= np.min(list(distances.values()), axis=0))
