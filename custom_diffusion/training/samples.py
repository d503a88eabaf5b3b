"""Training samples: which images a position in the run shows, and every random number of it.

All that is random about a sample follows from (seed, position in the run) alone, so neither workers, nor ranks, nor an
interruption change it.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from custom_diffusion.images import open_image
from custom_diffusion.training.augmentation import (
    LARGEST_SCALE,
    class_time_ids,
    draw_augmentation,
    draw_class_crop,
    photo_mask,
    photo_time_ids,
    render_class_image,
    render_photo,
    shrink_to,
)
from custom_diffusion.training.holes import draw_hole

# What a random stream is for. Part of its seed, so that no two streams share numbers.
ORDER, CHOICE, DIFFUSION, PHOTO, CLASS_IMAGE, PHOTO_POOL, CLASS_POOL, PRIOR, CURVE, HOLES = range(10)


def random_stream(seed: int, purpose: int, *counters: int) -> np.random.Generator:
    """A generator that depends on its arguments only."""
    return np.random.default_rng([seed, purpose, *counters])


class View(NamedTuple):
    """Names a rendered image: equal views are equal pixels.

    Attributes:
        purpose: the random stream that renders it: PHOTO, CLASS_IMAGE, or PHOTO_POOL, CLASS_POOL with a pool of views.
        index: which photo or class image; in a pool, of a class image that several concepts have, the first.
        draw: which draw of it: the position in the run, or the number in the pool.
        flip: a class image is mirrored (photos draw this with the rest of their augmentation).
    """

    purpose: int
    index: int
    draw: int
    flip: bool = False


@dataclass(frozen=True)
class SampleSettings:
    """What the samples of a run depend on, besides the images. Sizes in pixels and latent cells."""

    seed: int
    size: int
    latent_size: int
    latent_channels: int
    num_train_timesteps: int
    center_crop: bool
    hflip: bool
    augment: bool
    pool_size: int | None = None  # augmentations per photo with --cache_latents, else None
    inpainting: bool = False  # the model is given images with holes beside the noise


class TrainingSamples(Dataset):
    """The endless sequence of samples of a run, by position.

    A pass over the images (an epoch) has max(photos, class images) positions, shuffled anew each time; index i of it
    pairs photo i mod num_photos with class image i mod num_class_images.

    Args:
        photos: (image path, prompt) of every concept.
        class_images: (image path, caption), empty without prior preservation.
    """

    def __init__(self, photos: list[tuple[Path, str]], class_images: list[tuple[Path, str]], settings: SampleSettings):
        self.settings = settings
        largest = int(LARGEST_SCALE * settings.size)
        # Photos are few and shown thousands of times, so they are decoded once; the many class images when needed.
        self.photos, self.photo_sizes = [], []  # (image, prompt) and (width, height) of its file
        for path, prompt in photos:
            image = open_image(path)
            self.photo_sizes.append(image.size)
            self.photos.append((shrink_to(image, largest, enlarge=False), prompt))
        self.class_images = class_images
        first_with = {path: index for index, (path, _) in reversed(list(enumerate(class_images)))}
        self._same_file = [first_with[path] for path, _ in class_images]  # concepts may share their class images
        self._class_sizes = {}  # (width, height) by path
        self.epoch_length = max(len(photos), len(class_images))

    def indices(self, position: int) -> tuple[int, int | None]:
        """Which photo and which class image a position shows."""
        epoch, offset = divmod(position, self.epoch_length)
        index = int(_epoch_order(self.settings.seed, epoch, self.epoch_length)[offset])
        return index % len(self.photos), index % len(self.class_images) if self.class_images else None

    def views(self, position: int) -> list[View]:
        """The images a position shows: a photo and, with prior preservation, a class image."""
        s = self.settings
        photo, class_image = self.indices(position)
        choice = random_stream(s.seed, CHOICE, position)
        flip = s.hflip and bool(choice.random() < 0.5)
        if s.pool_size is None:
            views = [View(PHOTO, photo, position), View(CLASS_IMAGE, class_image, position, flip)]
        else:
            draw = int(choice.integers(s.pool_size))
            file = None if class_image is None else self._same_file[class_image]
            views = [View(PHOTO_POOL, photo, draw), View(CLASS_POOL, file, 0, flip)]
        return views[:1] if class_image is None else views

    def __getitem__(self, item: tuple[int, bool]) -> dict:
        """The sample at item[0]; its images are rendered only if item[1], else `pixel_values` is None.

        With n = 2 under prior preservation (photo, class image), else 1:
            prompts: n strings. views: n `View`s. mask: (1, h, w).
            pixel_values: (n, 3, H, W) in [-1, 1]. timesteps: (n,) int64. noise, posterior_noise: (n, C, h, w).
            time_ids: (n, 6) float32, how much of each image is shown, as `photo_time_ids` says; of the view, like its pixels.
        For an inpainting model also holes: (n, 1, H, W) bool. hole_noise: (n, C, h, w), as posterior_noise, of the image
        without its hole.
        """
        position, with_pixels = item
        s = self.settings
        views = self.views(position)
        augmentation, photo, prompt = self._augmentation(views[0])
        prompts, pixels = [augmentation.prefix + prompt], []
        time_ids = [photo_time_ids(augmentation, photo, self.photo_sizes[views[0].index], s.size)]
        if with_pixels:
            pixels.append(render_photo(photo, augmentation, s.size))
        for view in views[1:]:
            path, caption = self.class_images[self.indices(position)[1]]
            prompts.append(caption)
            image = open_image(path) if with_pixels or path not in self._class_sizes else None
            crop, own_time_ids = self._class_crop(path, image, view)
            time_ids.append(own_time_ids)
            if with_pixels:
                pixels.append(render_class_image(image, crop, s.size))
        rng = random_stream(s.seed, DIFFUSION, position)
        shape = (len(views), s.latent_channels, s.latent_size, s.latent_size)
        return {
            "prompts": prompts,
            "views": views,
            "mask": photo_mask(augmentation, s.size, s.latent_size),
            "pixel_values": torch.stack(pixels) if with_pixels else None,
            "time_ids": torch.stack(time_ids),
            "timesteps": torch.from_numpy(rng.integers(s.num_train_timesteps, size=len(views))),
            "noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            "posterior_noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            **(self._holes(position, shape) if s.inpainting else {}),
        }

    def _holes(self, position, shape):
        """From a stream of their own: the rest of a sample is what it is for other models."""
        rng = random_stream(self.settings.seed, HOLES, position)
        return {
            "holes": torch.stack([draw_hole(rng, self.settings.size) for _ in range(shape[0])]),
            "hole_noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
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

    def _class_crop(self, path, image, view):
        """How a view shows a class image, and its time_ids. `image` may be None once its size is known."""
        s = self.settings
        if image is not None:
            self._class_sizes[path] = image.size
        original = self._class_sizes[path]
        crop = draw_class_crop(self._rng(view), *original, s.size, center_crop=s.center_crop, flip=view.flip)
        return crop, class_time_ids(crop, original, s.size)


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

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self):
        for batch in range(len(self)):
            start = self.first_position + (batch * self.num_processes + self.process_index) * self.batch_size
            yield list(range(start, start + self.batch_size))


def collate(samples: list[dict]) -> dict:
    """A batch in the order [photos..., class images...]; keys as in `TrainingSamples`, B samples of n images.

    prompts, views: n B entries. pixel_values: (n B, 3, H, W) of the samples that have them, in the order of
    `pixel_views`. mask: (B, 1, h, w). time_ids: (n B, 6). timesteps: (n B,). noise, posterior_noise: (n B, C, h, w). For an
    inpainting model also holes: (n B, 1, H, W). hole_noise: (n B, C, h, w).
    """
    num_images = len(samples[0]["views"])

    def in_order(key, chosen=samples):
        return [sample[key][n] for n in range(num_images) for sample in chosen]

    rendered = [sample for sample in samples if sample["pixel_values"] is not None]
    return {
        "prompts": in_order("prompts"),
        "views": in_order("views"),
        "pixel_views": in_order("views", rendered),
        "pixel_values": torch.stack(in_order("pixel_values", rendered)) if rendered else None,
        "mask": torch.stack([sample["mask"] for sample in samples]),
        "time_ids": torch.stack(in_order("time_ids")),
        "timesteps": torch.stack(in_order("timesteps")),
        "noise": torch.stack(in_order("noise")),
        "posterior_noise": torch.stack(in_order("posterior_noise")),
        **{key: torch.stack(in_order(key)) for key in ("holes", "hole_noise") if key in samples[0]},
    }


@dataclass
class Progress:
    """How far a run is: optimizer steps done, and samples seen by all processes together."""

    step: int
    position: int


class TrainingBatches:
    """This process's batches of the run, from `progress` to `max_train_steps`, as `collate` makes them.

    `progress` moves on while they are used. Steps that were skipped, because half-precision gradients overflowed, are made up
    for with further samples.

    Args:
        plan: as `BatchPlan` takes them: batch_size, accumulation, process_index, num_processes.
    Attributes:
        num_views: how many distinct images the planned steps render. With a pool of views, a view is rendered only the first
            time that this process sees it.
    """

    def __init__(self, samples: TrainingSamples, progress: Progress, max_train_steps: int, *, num_workers: int,
                 pin_memory: bool, **plan: int):  # fmt: skip
        self.samples = samples
        self.progress = progress
        self.max_train_steps = max_train_steps
        self.loading = {"num_workers": num_workers, "pin_memory": pin_memory}
        self.plan = plan
        self._batches, self.num_views = self._planned()

    def _planned(self):
        """The batches still to come, as lists of (position, whether its images must be rendered)."""
        num_steps = max(self.max_train_steps - self.progress.step, 0)
        plan = BatchPlan(first_position=self.progress.position, num_steps=num_steps, **self.plan)
        pooled = self.samples.settings.pool_size is not None
        seen, batches = set(), []
        for positions in plan:
            batch = []
            for position in positions:
                views = self.samples.views(position) if pooled else [position]
                batch.append((position, not seen.issuperset(views)))
                seen.update(views)
            batches.append(batch)
        return batches, len(seen)

    def __iter__(self) -> Iterator[dict]:
        while self.progress.step < self.max_train_steps:
            yield from DataLoader(
                self.samples,
                batch_sampler=self._batches,
                collate_fn=collate,
                worker_init_fn=_ignore_signals,
                **self.loading,
            )
            self._batches, _ = self._planned()


def _ignore_signals(_):
    # A Ctrl-C reaches the whole process group; the main process decides when to stop and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
