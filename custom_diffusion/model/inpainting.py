"""Models that paint the holes of an image (inpainting): how they are told, and drawn with from text alone."""

from collections.abc import Mapping

from diffusers import DiffusionPipeline
from PIL import Image


def paints_holes(unet: Mapping) -> bool:
    """Whether the UNet of this configuration takes, beside noisy latents, a mask and the latents of an image without its hole."""
    return unet["in_channels"] == 2 * unet["out_channels"] + 1


def all_hole(pipe: DiffusionPipeline, height: int | None = None, width: int | None = None, count: int = 1) -> dict:
    """What a pipeline is called with, beside prompts, so that it draws whole images. Nothing for a text-to-image pipeline.

    Args:
        height, width: pixels, by default the model's.
        count: how many images are drawn at once. Each gets an image of its own, so that it depends on its own generator alone.
    """
    if not paints_holes(pipe.unet.config):
        return {}
    own = pipe.unet.config.sample_size * pipe.vae_scale_factor
    size = (width or own, height or own)
    grey, everything = Image.new("RGB", size, (127, 127, 127)), Image.new("L", size, 255)
    return {"image": [grey] * count, "mask_image": [everything] * count, "strength": 1.0}
