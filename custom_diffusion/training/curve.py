"""The curve that tells whether anything is still learned, or forgotten: the objective on a fixed set, between steps.

The loss of a step mostly says which timesteps and images it drew. With the same images, noise and timesteps each time, that of
the photos falls while the concept is learned and then lies still, and that of class images which training does not show rises
with what is forgotten.

Source: Voronov et al., "Is This Loss Informative?" (NeurIPS 2023, arXiv 2302.04841).
"""

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDPMScheduler

from custom_diffusion.images import open_image
from custom_diffusion.model.concept_model import ConceptModel
from custom_diffusion.training.augmentation import (
    class_time_ids,
    draw_augmentation,
    draw_class_crop,
    photo_time_ids,
    render_class_image,
    render_photo,
)
from custom_diffusion.training.latents import LatentEncoder
from custom_diffusion.training.objective import prediction_target
from custom_diffusion.training.samples import CURVE, TrainingSamples, random_stream

logger = get_logger(__name__)
CONCEPT_LOSS, PRIOR_LOSS = "concept_loss", "prior_loss_held_out"
# What measuring may cost, as a share of the training between two points: a twentieth of a run of 250 steps, as there is one point
# more than there are stretches. Training on an image takes as long as two forward passes (most weights have no gradients; the VAE
# and the optimizer come on top).
SHARE, PASSES_PER_IMAGE = 0.045, 2
CHUNK = 4  # images a forward pass, whatever the batch size and the number of processes, so that sums have one order
ENOUGH = 80  # samples of each set: five photos at sixteen timesteps
WINDOW, LEAST_FALL = 3, 0.05  # when the concept's loss counts as having stopped falling


@dataclass(frozen=True)
class Point:
    """Both losses after `step` optimizer steps: mean squared errors of a value. `prior` is None without such images."""

    step: int
    concept: float
    prior: float | None

    def by_name(self) -> dict[str, float]:
        """As trackers show it."""
        return {CONCEPT_LOSS: self.concept} | ({} if self.prior is None else {PRIOR_LOSS: self.prior})


class Curve:
    """What was measured so far. It goes into checkpoints like the optimizer's state, so that a resumed run has all of it.

    Attributes:
        num_samples: of each set; None before it is known. A resumed run keeps that of its checkpoint: other samples would
            put a step into the curve.
    """

    def __init__(self):
        self.points: list[Point] = []
        self.num_samples: int | None = None

    def latest(self) -> dict[str, float]:
        """The last losses by name."""
        return self.points[-1].by_name() if self.points else {}

    def state_dict(self) -> dict:
        return {"points": [astuple(point) for point in self.points], "num_samples": self.num_samples}

    def load_state_dict(self, state: dict) -> None:
        self.points = [Point(*values) for values in state["points"]]
        self.num_samples = state["num_samples"]


def learned_at(points: list[Point]) -> int | None:
    """The first step at which the concept's loss had stopped falling; None if it falls to the end.

    That is when the mean of the last WINDOW points lies below that of the WINDOW before by less than LEAST_FALL of what
    it has fallen since the first point.
    """
    losses = [point.concept for point in points]
    for end in range(2 * WINDOW + 1, len(points) + 1):
        before, last = fmean(losses[end - 2 * WINDOW : end - WINDOW]), fmean(losses[end - WINDOW : end])
        if losses[0] > last and before - last < LEAST_FALL * (losses[0] - last):
            return points[end - 1].step
    return None


def best_step(points: list[Point], prior_loss_weight: float) -> int | None:
    """The step after the first at which both losses together, the prior's weighted, were the lowest; None before there is one.

    Where class images are measured at some points only, the others do not count.
    """
    trained = [point for point in points if point.step > 0]
    if any(point.prior is not None for point in trained):
        trained = [point for point in trained if point.prior is not None]
    sums = {point.step: point.concept + prior_loss_weight * (point.prior or 0) for point in trained}
    finite = {step: loss for step, loss in sums.items() if math.isfinite(loss)}
    return min(finite, key=finite.get, default=None)


def affordable_samples(images_per_step: int, validation_steps: int, num_sets: int) -> int:
    """How many samples of each set to measure every `validation_steps`, so that it takes at most SHARE of the run.

    Whole chunks, and at least one, whatever it takes.

    Args:
        images_per_step: photos and class images of an optimizer step, in all processes.
    """
    passes = SHARE * PASSES_PER_IMAGE * images_per_step * validation_steps
    return min(max(int(passes / num_sets) // CHUNK * CHUNK, CHUNK), ENOUGH)


def in_turn(groups: Iterable[list]) -> list:
    """One of each group, then the next of each, and so on: several concepts have equal parts in the first few."""
    missing = object()
    return [item for item in chain.from_iterable(zip_longest(*groups, fillvalue=missing)) if item is not missing]


class ShownImage(NamedTuple):
    """pixels: (3, H, W) in [-1, 1]. prompt: what it shows. time_ids: (6,), as `Family.added_conditions` takes them."""

    pixels: torch.Tensor
    prompt: str
    time_ids: torch.Tensor


def photos_to_measure(samples: TrainingSamples, size: int, most: int) -> list[ShownImage]:
    """The run's photos, at most so many: without augmentation, cut at the centre."""
    by_prompt = {}
    for (photo, prompt), original in zip(samples.photos, samples.photo_sizes):
        by_prompt.setdefault(prompt, []).append((photo, prompt, original))
    return [_shown_photo(*one, size) for one in in_turn(by_prompt.values())[:most]]


def _shown_photo(photo, prompt, original, size):
    whole = draw_augmentation(None, *photo.size, size, center_crop=True, hflip=False, augment=False)  # draws nothing
    return ShownImage(render_photo(photo, whole, size), prompt, photo_time_ids(whole, photo, original, size))


def class_images_to_measure(files: Iterable[tuple[Path, str]], size: int, most: int) -> list[ShownImage]:
    """The first `most` images of (path, caption) that can be read, cut at the centre.

    Nothing has looked at these files before: training does not need them.
    """
    images = []
    for path, caption in files:
        if len(images) == most:
            break
        try:
            image = open_image(path)
        except Exception as error:  # Pillow raises many types on foreign bytes
            logger.warning(f"a class image that is not needed for training is passed over: '{path}' ({error})")
            continue
        crop = draw_class_crop(None, *image.size, size, center_crop=True, flip=False)  # draws nothing
        time_ids = class_time_ids(crop, image.size, size)
        images.append(ShownImage(render_class_image(image, crop, size), caption, time_ids))
    return images


def smallest(accelerator: Accelerator, number: int) -> int:
    """Of all processes' numbers: machines that do not share their disks may hold different class images."""
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())


class FixedSet:
    """Photos and class images to measure the objective on: with the same noise and timesteps each time, and in every run.

    Sample i of `num_samples` of a set shows image i (again from the first after the last) at the middle of the i-th of as many
    equal parts of the timesteps. Each process measures its share.

    Args:
        photos, class_images: as the functions above make them. Without class images the prior is not measured.
        encoder: still with its VAE.
        inpainting: the model is one. It is given all to paint, as when it is drawn from text alone.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        scheduler: DDPMScheduler,
        encoder: LatentEncoder,
        photos: list[ShownImage],
        class_images: list[ShownImage],
        num_samples: int,
        *,
        inpainting: bool = False,
    ):
        self.accelerator = accelerator
        self.scheduler = scheduler
        self.num_samples = num_samples
        self.inpainting = inpainting
        sets = [images for images in (photos, class_images) if images]
        self.num_sets = len(sets)
        chunks = [
            (number, images, range(start, min(start + CHUNK, num_samples)))
            for number, images in enumerate(sets)
            for start in range(0, num_samples, CHUNK)
        ]
        own = chunks[accelerator.process_index :: accelerator.num_processes]
        self._chunks = [self._prepare(*chunk, encoder) for chunk in own]

    @torch.no_grad()
    def _prepare(self, number, images, indices, encoder):
        """Where the chunk's losses go, then its latents and noise, and what the model is given beside them.

        First of these, in the channels after those of the noisy latents, what an inpainting model takes; of others nothing.
        """
        device, first = self.accelerator.device, number * self.num_samples
        images = [images[index % len(images)] for index in indices]
        latents = torch.cat([_latents(encoder, image.pixels.to(device)) for image in images])
        noise = torch.stack([_noise(number, index, latents.shape[1:]) for index in indices])
        pixels = torch.stack([image.pixels for image in images]).to(device)
        holes = torch.ones_like(pixels[:, :1], dtype=torch.bool)
        all_hole = {"pixel_values": pixels, "holes": holes, "hole_noise": torch.zeros_like(latents)}
        beside = encoder.without_holes(all_hole) if self.inpainting else latents[:, :0]
        num_timesteps = self.scheduler.config.num_train_timesteps
        timesteps = torch.tensor([(2 * index + 1) * num_timesteps // (2 * self.num_samples) for index in indices])
        time_ids = torch.stack([image.time_ids for image in images])
        conditions = timesteps.to(device), [image.prompt for image in images], time_ids.to(device)
        return slice(first + indices[0], first + indices[-1] + 1), latents, noise.to(device), beside, conditions

    @torch.no_grad()
    def measure(self, model: ConceptModel, step: int) -> Point:
        """Both losses of the model after `step` steps, the same in every process."""
        model.eval()
        losses = torch.zeros(self.num_sets * self.num_samples, device=self.accelerator.device)
        for places, latents, noise, beside, conditions in self._chunks:
            timesteps = conditions[0]
            noisy_latents = torch.cat([self.scheduler.add_noise(latents, noise, timesteps), beside], dim=1)
            model_pred = model(noisy_latents, *conditions)
            target = prediction_target(self.scheduler, latents, noise, timesteps)
            losses[places] = (model_pred.float() - target.float()).square().mean(dim=(1, 2, 3))
        model.train()
        losses = self.accelerator.reduce(losses, reduction="sum").tolist()  # every sample is one process's, of others 0
        means = [math.fsum(one) / self.num_samples for one in (losses[: self.num_samples], losses[self.num_samples :])]
        return Point(step, means[0], means[1] if self.num_sets == 2 else None)


def _latents(encoder, pixels):
    """(1, C, h, w): the mean of the posterior, as no noise is to be left but that of the objective."""
    mean, _ = encoder.moments(pixels.unsqueeze(0))
    return (mean - encoder.shift) * encoder.scale


def _noise(number, index, shape):
    """(C, h, w) float32, whatever the run's seed: curves of several runs can be compared."""
    noise = random_stream(0, CURVE, number, index).standard_normal(tuple(shape), dtype="float32")
    return torch.from_numpy(noise)
