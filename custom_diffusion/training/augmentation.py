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


@dataclass(frozen=True)
class ClassCrop:
    """How one class image is shown.

    Attributes:
        width, height: that it is resized to, in pixels, the shorter of them being the side of the square that is shown.
        left, top: of that square.
        flip: mirror the square.
    """

    width: int
    height: int
    left: int
    top: int
    flip: bool


def draw_class_crop(
    rng: np.random.Generator, width: int, height: int, size: int, *, center_crop: bool, flip: bool
) -> ClassCrop:
    """Draw how a class image of width x height is shown on size x size pixels."""
    width, height = resized(width, height, size)
    left, top = (s // 2 if center_crop else int(rng.integers(s + 1)) for s in (width - size, height - size))
    return ClassCrop(width, height, left, top, flip)


def render_class_image(image: Image.Image, crop: ClassCrop, size: int) -> torch.Tensor:
    """The class image as `crop` shows it: (3, size, size) float32 in [-1, 1]."""
    image = shrink_to(image, size, enlarge=True).crop((crop.left, crop.top, crop.left + size, crop.top + size))
    return to_pixels(ImageOps.mirror(image) if crop.flip else image)


# Original height and width, top and left of the crop, height and width shown: what some models are told of every image. Crops
# are in pixels of the image as it was resized, and of its mirror where it is mirrored. Source: arXiv 2307.01952, section 2.2.
def photo_time_ids(
    augmentation: Augmentation, photo: Image.Image, original: tuple[int, int], size: int
) -> torch.Tensor:
    """(6,) float32 of a photo.

    A photo that is pasted on a canvas is shown from its square's corner on; there is no such thing as a negative crop.

    Args:
        photo: that the augmentation was drawn for. original: (width, height) of its file.
    """
    a = augmentation
    left, top, right, _ = a.crop
    ratio = a.scale / (right - left)
    left, top = ratio * (photo.width - right if a.flip else left), ratio * top
    if a.scale > size:
        left, top = left + a.left, top + a.top
    return torch.tensor([original[1], original[0], top, left, size, size], dtype=torch.float32)


def class_time_ids(crop: ClassCrop, original: tuple[int, int], size: int) -> torch.Tensor:
    """(6,) float32 of a class image; `original` is (width, height) of its file."""
    left = crop.width - crop.left - size if crop.flip else crop.left
    return torch.tensor([original[1], original[0], crop.top, left, size, size], dtype=torch.float32)


def shrink_to(image: Image.Image, shorter_side: int, *, enlarge: bool) -> Image.Image:
    """The image with its shorter side resized to `shorter_side` pixels; smaller ones are left unless `enlarge`."""
    size = resized(*image.size, shorter_side)
    if min(image.size) == shorter_side or (min(image.size) < shorter_side and not enlarge):
        return image
    return image.resize(size, Image.Resampling.BILINEAR)


def resized(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """(width, height) with the shorter side at `shorter_side` pixels."""
    ratio = shorter_side / min(width, height)
    return tuple(max(shorter_side, round(ratio * side)) for side in (width, height))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)
