"""Drawing validation images with the modules in memory, and handing them to files and trackers."""

from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image

from custom_diffusion.errors import InputError
from custom_diffusion.files import SAMPLES_DIR, whole_file
from custom_diffusion.model.concept_model import ConceptModel
from custom_diffusion.model.inpainting import all_hole, paints_holes
from custom_diffusion.model.loading import load_vae
from custom_diffusion.model.source import ModelSource
from custom_diffusion.model.text_encoders import TextEncoders

logger = get_logger(__name__)
NUM_INFERENCE_STEPS = 25


class Validation:
    """Draws one prompt, with the same noise each time.

    Args:
        source, dtype: where the VAE comes from, each time that images are drawn, and its precision.
        scheduler: the model's training schedule.
        prompt, num_images: what to draw, and how many images at a time. With 0, or without a prompt, nothing is ever drawn.
        size: side of the images in pixels.
        pipeline_options: of the family's pipeline (`ModelShape`).
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, source: ModelSource, scheduler: DDPMScheduler, *,
                 prompt: str | None, num_images: int, size: int, seed: int, dtype: torch.dtype,
                 pipeline_options: dict):  # fmt: skip
        self.accelerator = accelerator
        self.folder = output_dir / SAMPLES_DIR
        self.source = source
        self.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        self.prompt = prompt
        self.num_images = num_images if prompt else 0
        self.size = size
        self.seed = seed
        self.dtype = dtype
        self.pipeline_options = pipeline_options

    def pipeline(self, unet: UNet2DConditionModel, text: TextEncoders) -> DiffusionPipeline:
        """A pipeline over the given modules, without a safety checker; its VAE is loaded only if images are drawn."""
        family = text.family
        pipeline_class = getattr(diffusers, family.inpainting if paints_holes(unet.config) else family.text_to_image)
        pipeline = pipeline_class(
            vae=self._load_vae(), unet=unet, scheduler=self.scheduler, **text.parts(), **self.pipeline_options
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load_vae(self):
        """None if no images are wanted, or, with a warning, if the model is no longer there: training goes on without."""
        if not self.num_images:
            return None
        try:
            return load_vae(self.source, self.dtype, self.accelerator.device, again=True)
        except InputError as error:
            logger.warning(f"no images are drawn this time: {error.problems[0]}")
            return None

    def during_training(self, model: ConceptModel, step: int) -> None:
        """Draw with the model as it is after `step` optimizer steps, on the main process."""
        if self.accelerator.is_main_process and self.num_images:
            model.eval()
            pipeline = self.pipeline(model.unet, model.text)
            self.show(pipeline, name=f"step-{step:06d}", tag="validation", step=step)
            model.train()

    def show(self, pipeline: DiffusionPipeline, *, name: str, tag: str, step: int) -> list[Path]:
        """Draw, and give the images to the trackers under `tag` and to files `<name>-0.png`...; returns their paths."""
        images = self.draw(pipeline)
        if not images:
            return []
        log_samples(self.accelerator, images, tag=tag, prompt=self.prompt, step=step)
        return save_samples(images, self.folder, name)

    @torch.no_grad()
    def draw(self, pipeline: DiffusionPipeline) -> list[Image.Image]:
        """`num_images` images, the i-th from noise seeded with seed + i on the CPU, the same on every device.

        None without a VAE.
        """
        return [
            pipeline(
                self.prompt,
                height=self.size,
                width=self.size,
                num_inference_steps=NUM_INFERENCE_STEPS,
                generator=torch.Generator().manual_seed(self.seed + index),
                **all_hole(pipeline, self.size, self.size),
            ).images[0]
            for index in range(self.num_images if pipeline.vae is not None else 0)
        ]


def save_samples(images: list[Image.Image], folder: Path, name: str) -> list[Path]:
    """Write `<name>-0.png`... into `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}-{index}.png" for index in range(len(images))]
    for image, path in zip(images, paths):
        with whole_file(path) as temporary:
            image.save(temporary, format="PNG")
    return paths


def log_samples(accelerator: Accelerator, images: list[Image.Image], *, tag: str, prompt: str, step: int) -> None:
    """Show the images, with their prompt, in TensorBoard and wandb."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])  # (N, H, W, 3) uint8
            tracker.writer.add_images(tag, pixels, step, dataformats="NHWC")
            tracker.writer.add_text(f"{tag}/prompt", prompt, step)
        elif tracker.name == "wandb":
            import wandb

            tracker.log({tag: [wandb.Image(im, caption=f"{i}: {prompt}") for i, im in enumerate(images)]}, step=step)
