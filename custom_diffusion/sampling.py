"""Drawing validation pictures with the modules in memory, and handing them to files and trackers."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from custom_diffusion.files import whole_file
from custom_diffusion.models import ModelSource, load_vae

NUM_INFERENCE_STEPS = 25


class Sampler:
    """Draws one prompt, with the same noise each time.

    Args:
        source, dtype, device: where the VAE comes from, when the first picture is drawn, and how it is kept.
        scheduler: the model's training schedule.
        size: side of the pictures in pixels.
        num_images: how many at a time. With 0, or without a prompt, nothing is ever drawn.
    """

    def __init__(self, source: ModelSource, scheduler: DDPMScheduler, *, prompt: str | None, num_images: int, size: int,
                 seed: int, dtype: torch.dtype, device: torch.device):  # fmt: skip
        self.source = source
        self.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
        self.prompt = prompt
        self.num_images = num_images if prompt else 0
        self.size = size
        self.seed = seed
        self.dtype = dtype
        self.device = device
        self._vae = None

    def pipeline(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase
    ) -> StableDiffusionPipeline:
        """A pipeline over the given modules, without a safety checker. Its VAE is loaded once, if pictures are drawn."""
        if self._vae is None and self.num_images:
            self._vae = load_vae(self.source, self.dtype, self.device)
        pipeline = StableDiffusionPipeline(
            vae=self._vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def draw(self, pipeline: StableDiffusionPipeline) -> list[Image.Image]:
        """`num_images` pictures, the i-th from noise seeded with seed + i on the CPU, the same on every device."""
        return [
            pipeline(
                self.prompt,
                height=self.size,
                width=self.size,
                num_inference_steps=NUM_INFERENCE_STEPS,
                generator=torch.Generator().manual_seed(self.seed + index),
            ).images[0]
            for index in range(self.num_images)
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
    """Show the pictures, with their prompt, in TensorBoard and wandb."""
    if not images:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])  # (N, H, W, 3) uint8
            tracker.writer.add_images(tag, pixels, step, dataformats="NHWC")
            tracker.writer.add_text(f"{tag}/prompt", prompt, step)
        elif tracker.name == "wandb":
            import wandb

            tracker.log({tag: [wandb.Image(im, caption=f"{i}: {prompt}") for i, im in enumerate(images)]}, step=step)
