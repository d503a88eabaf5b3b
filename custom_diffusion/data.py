"""Training samples: photos augmented and masked, class images cropped, and every random number of a sample.

All that is random about a sample follows from (seed, position in the run) alone, so neither workers, nor ranks, nor an
interruption change it.
"""

import signal
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

# What a random stream is for. Part of its seed, so that no two streams share numbers.
ORDER, CHOICE, DIFFUSION, PHOTO, CLASS_IMAGE, PHOTO_POOL, CLASS_POOL, PRIOR = range(8)
SMALL_PREFIXES = ("a far away ", "very small ")
LARGE_PREFIXES = ("zoomed in ", "close up ")
PROMPT_PREFIXES = ("", *SMALL_PREFIXES, *LARGE_PREFIXES)
LARGEST_SCALE = 1.4  # of the resolution; photos are kept no larger than any augmentation needs them


def random_stream(seed: int, purpose: int, *counters: int) -> np.random.Generator:
    """A generator that depends on its arguments only."""
    return np.random.default_rng([seed, purpose, *counters])


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
        mask[:, min(row, latent_size - 1), min(column, latent_size - 1)] = 1.0
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


def open_picture(path: Path) -> Image.Image:
    """The picture, upright as its EXIF says, in RGB."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


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


class View(NamedTuple):
    """Names a rendered picture: equal views are equal pixels.

    Attributes:
        purpose: the random stream that renders it: PHOTO, CLASS_IMAGE, or PHOTO_POOL, CLASS_POOL with a pool of views.
        index: which photo or class image.
        draw: which draw of it: the position in the run, or the number in the pool.
        flip: a class image is mirrored (photos draw this with the rest of their augmentation).
    """

    purpose: int
    index: int
    draw: int
    flip: bool = False


@dataclass(frozen=True)
class SampleSettings:
    """What the samples of a run depend on, besides the pictures. Sizes in pixels and latent cells."""

    seed: int
    size: int
    latent_size: int
    latent_channels: int
    num_train_timesteps: int
    center_crop: bool
    hflip: bool
    augment: bool
    pool_size: int | None = None  # augmentations per photo with --cache_latents, else None


class TrainingSamples(Dataset):
    """The endless sequence of samples of a run, by position.

    A pass over the pictures (an epoch) has max(photos, class images) positions, shuffled anew each time; index i of it
    pairs photo i mod num_photos with class image i mod num_class_images.

    Args:
        photos: (picture path, prompt) of every concept.
        class_images: (picture path, caption), empty without prior preservation.
    """

    def __init__(self, photos: list[tuple[Path, str]], class_images: list[tuple[Path, str]], settings: SampleSettings):
        self.settings = settings
        largest = int(LARGEST_SCALE * settings.size)
        # Photos are few and shown thousands of times, so they are decoded once; the many class images when needed.
        self.photos = [(shrink_to(open_picture(path), largest, enlarge=False), prompt) for path, prompt in photos]
        self.class_images = class_images
        self.epoch_length = max(len(photos), len(class_images))

    def indices(self, position: int) -> tuple[int, int | None]:
        """Which photo and which class image a position shows."""
        epoch, offset = divmod(position, self.epoch_length)
        index = int(_epoch_order(self.settings.seed, epoch, self.epoch_length)[offset])
        return index % len(self.photos), index % len(self.class_images) if self.class_images else None

    def views(self, position: int) -> list[View]:
        """The pictures a position shows: a photo and, with prior preservation, a class image."""
        s = self.settings
        photo, class_image = self.indices(position)
        choice = random_stream(s.seed, CHOICE, position)
        flip = s.hflip and bool(choice.random() < 0.5)
        if s.pool_size is None:
            views = [View(PHOTO, photo, position), View(CLASS_IMAGE, class_image, position, flip)]
        else:
            draw = int(choice.integers(s.pool_size))
            views = [View(PHOTO_POOL, photo, draw), View(CLASS_POOL, class_image, 0, flip)]
        return views[:1] if class_image is None else views

    def __getitem__(self, item: tuple[int, bool]) -> dict:
        """The sample at item[0]; its pictures are rendered only if item[1], else `pixel_values` is None.

        With n = 2 under prior preservation (photo, class image), else 1:
            prompts: n strings. views: n `View`s. mask: (1, h, w).
            pixel_values: (n, 3, H, W) in [-1, 1]. timesteps: (n,) int64. noise, posterior_noise: (n, C, h, w).
        """
        position, with_pixels = item
        s = self.settings
        views = self.views(position)
        augmentation, photo, prompt = self._augmentation(views[0])
        prompts, pixels = [augmentation.prefix + prompt], []
        if with_pixels:
            pixels.append(render_photo(photo, augmentation, s.size))
        for view in views[1:]:
            path, caption = self.class_images[view.index]
            prompts.append(caption)
            if with_pixels:
                pixels.append(self._class_pixels(path, view))
        rng = random_stream(s.seed, DIFFUSION, position)
        shape = (len(views), s.latent_channels, s.latent_size, s.latent_size)
        return {
            "prompts": prompts,
            "views": views,
            "mask": photo_mask(augmentation, s.size, s.latent_size),
            "pixel_values": torch.stack(pixels) if with_pixels else None,
            "timesteps": torch.from_numpy(rng.integers(s.num_train_timesteps, size=len(views))),
            "noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            "posterior_noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
        }

    def _rng(self, view):
        return random_stream(self.settings.seed, *view[:3])

    def _augmentation(self, view):
        s = self.settings
        photo, prompt = self.photos[view.index]
        augmentation = draw_augmentation(
            self._rng(view), photo.width, photo.height, s.size,
            center_crop=s.center_crop, hflip=s.hflip, augment=s.augment,
        )  # fmt: skip
        return augmentation, photo, prompt

    def _class_pixels(self, path, view):
        s = self.settings
        return render_class_image(
            open_picture(path), self._rng(view), s.size, center_crop=s.center_crop, flip=view.flip
        )


@lru_cache(maxsize=2)
def _epoch_order(seed, epoch, length):
    return random_stream(seed, ORDER, epoch).permutation(length)


@dataclass(frozen=True)
class BatchPlan:
    """Which positions this process sees, batch by batch, from `first_position` on.

    An optimizer step takes accumulation x processes x batch positions in a row, whoever computes them.
    """

    first_position: int
    num_steps: int
    batch_size: int
    accumulation: int
    process_index: int
    num_processes: int

    @property
    def samples_per_step(self) -> int:
        return self.accumulation * self.num_processes * self.batch_size

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self):
        for batch in range(len(self)):
            start = self.first_position + (batch * self.num_processes + self.process_index) * self.batch_size
            yield list(range(start, start + self.batch_size))


def collate(samples: list[dict]) -> dict:
    """A batch in the order [photos..., class images...]; keys as in `TrainingSamples`, B samples of n pictures.

    prompts, views: n B entries. pixel_values: (n B, 3, H, W) of the samples that have them, in the order of
    `pixel_views`. mask: (B, 1, h, w). timesteps: (n B,). noise, posterior_noise: (n B, C, h, w).
    """
    num_pictures = len(samples[0]["views"])

    def in_order(key, chosen=samples):
        return [sample[key][n] for n in range(num_pictures) for sample in chosen]

    rendered = [sample for sample in samples if sample["pixel_values"] is not None]
    return {
        "prompts": in_order("prompts"),
        "views": in_order("views"),
        "pixel_views": in_order("views", rendered),
        "pixel_values": torch.stack(in_order("pixel_values", rendered)) if rendered else None,
        "mask": torch.stack([sample["mask"] for sample in samples]),
        "timesteps": torch.stack(in_order("timesteps")),
        "noise": torch.stack(in_order("noise")),
        "posterior_noise": torch.stack(in_order("posterior_noise")),
    }


def make_dataloader(
    samples: TrainingSamples, plan: BatchPlan, *, num_workers: int, pin_memory: bool
) -> tuple[DataLoader, int]:
    """A loader of the plan's batches, and how many distinct pictures it renders.

    With a pool of views, a view is rendered only the first time that this process sees it.
    """
    pooled = samples.settings.pool_size is not None
    seen, batches = set(), []
    for positions in plan:
        batch = []
        for position in positions:
            views = samples.views(position) if pooled else [position]
            batch.append((position, not seen.issuperset(views)))
            seen.update(views)
        batches.append(batch)
    loader = DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
    )
    return loader, len(seen)


def _ignore_signals(_):
    # A Ctrl-C reaches the whole process group; the main process decides when to stop and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
