"""How a photo or class image is shown: drawn at random, rendered to pixels, and masked. Source: the reference script."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

SMALL_PREFIXES = ("a far away ", "very small ")
LARGE_PREFIXES = ("zoomed in ", "close up ")
PROMPT_PREFIXES = ("", *SMALL_PREFIXES, *LARGE_PREFIXES)
LARGEST_SCALE = 1.4  # of the resolution; photos are kept no larger than any augmentation needs them


@dataclass(frozen=True)
class Augmentation:
    """How one photo is shown.

    Attributes:
        flip: mirror it.
        crop: (left, top, right, bottom) of the square taken from the photo, in its pixels.
        scale: side to which that square is resized, in pixels.
        left, top: where it is pasted on the canvas (scale <= size), or where the canvas is cut from it (scale > size).
        prefix: words put before the prompt.
        padded: the canvas may show padding, so the mask leaves out a border of one latent cell.
    """

    flip: bool
    crop: tuple[int, int, int, int]
    scale: int
    left: int
    top: int
    prefix: str
    padded: bool


def draw_augmentation(
    rng: np.random.Generator, width: int, height: int, size: int, *, center_crop: bool, hflip: bool, augment: bool
) -> Augmentation:
    """Draw how a photo of width x height is shown on a canvas of size x size pixels. Source: the reference script."""
    flip = hflip and rng.random() < 0.5
    side = min(width, height)
    slack = (width - side, height - side)
    left, top = (s // 2 if center_crop else int(rng.integers(s + 1)) for s in slack)
    crop = (left, top, left + side, top + side)
    if not augment:
        return Augmentation(flip, crop, size, 0, 0, "", padded=False)
    if rng.random() < 0.66:
        scale = int(rng.integers(size // 3, size + 1))
    else:
        scale = int(rng.integers(int(1.2 * size), int(LARGEST_SCALE * size)))
    paste_left, paste_top = (int(x) for x in rng.integers(abs(size - scale) + 1, size=2))
    prefix = ""
    if scale < 0.6 * size:
        prefix = str(rng.choice(SMALL_PREFIXES))
    elif scale > size:
        prefix = str(rng.choice(LARGE_PREFIXES))
    return Augmentation(flip, crop, scale, paste_left, paste_top, prefix, padded=scale <= size)


def render_photo(photo: Image.Image, augmentation: Augmentation, size: int) -> torch.Tensor:
    """The photo as its augmentation shows it: (3, size, size) float32 in [-1, 1], padding 0 (grey)."""
    a = augmentation
    square = photo.crop(a.crop).resize((a.scale, a.scale), Image.Resampling.BILINEAR)
    pixels = to_pixels(ImageOps.mirror(square) if a.flip else square)
    if a.scale > size:
        return pixels[:, a.top : a.top + size, a.left : a.left + size].contiguous()
    canvas = torch.zeros(3, size, size)
    canvas[:, a.top : a.top + a.scale, a.left : a.left + a.scale] = pixels
    return canvas


def photo_mask(augmentation: Augmentation, size: int, latent_size: int) -> torch.Tensor:
    """Where the loss counts: (1, latent_size, latent_size), 1 on the photo less a border of one cell, 0 elsewhere."""
    if not augmentation.padded:
        return torch.ones(1, latent_size, latent_size)
    mask = torch.zeros(1, latent_size, latent_size)
    factor = size // latent_size
    rows, columns = (
        slice(start // factor + 1, (start + augmentation.scale) // factor - 1)
        for start in (augmentation.top, augmentation.left)
    )
    mask[:, rows, columns] = 1.0
    if not mask.any():  # a photo of a few cells is all border; its middle still counts
        row, column = ((s + augmentation.scale // 2) // factor for s in (augmentation.top, augmentation.left))
        mask[:, row, column] = 1.0
    return mask


def render_class_image(
    image: Image.Image, rng: np.random.Generator, size: int, *, center_crop: bool, flip: bool
) -> torch.Tensor:
    """A class image with its shorter side resized to `size`, cropped: (3, size, size) float32 in [-1, 1]."""
    image = shrink_to(image, size, enlarge=True)
    slack = (image.width - size, image.height - size)
    left, top = (s // 2 if center_crop else int(rng.integers(s + 1)) for s in slack)
    image = image.crop((left, top, left + size, top + size))
    return to_pixels(ImageOps.mirror(image) if flip else image)


def shrink_to(image: Image.Image, shorter_side: int, *, enlarge: bool) -> Image.Image:
    """The image with its shorter side resized to `shorter_side` pixels; smaller ones are left unless `enlarge`."""
    ratio = shorter_side / min(image.size)
    if ratio == 1 or (ratio > 1 and not enlarge):
        return image
    size = tuple(max(shorter_side, round(ratio * side)) for side in image.size)
    return image.resize(size, Image.Resampling.BILINEAR)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)
