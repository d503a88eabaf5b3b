"""From images to latents: the VAE's encoder, and a cache of what it has encoded."""

import torch
from diffusers import AutoencoderKL

from custom_diffusion.model.loading import image_layout

PIXELS_AT_ONCE = 4 * 512 * 512  # one image of 1024 x 1024


class LatentEncoder:
    """Encodes batches of `samples.collate` into latents.

    The posterior's mean and deviation are kept for every view when `num_views` is given (`--cache_latents`); the noise
    that samples from it is the sample's own each time. They stay on the device, 128 KB a view at 512 pixels, because fetching
    them from the CPU would stall a GPU at every step. After the last of `num_views` the VAE is let go.

    Args:
        vae: its encoder is enough.
        num_views: how many distinct views the run will show this process, or None not to keep anything.
    """

    def __init__(self, vae: AutoencoderKL, num_views: int | None):
        self.vae = vae
        self.shift, self.scale = _scaling(vae)
        self.num_views = num_views
        self.cache = {}

    @torch.no_grad()
    def __call__(self, batch: dict) -> torch.Tensor:
        """(n B, C, h, w) float32 latents, scaled as the UNet expects, on the VAE's device."""
        noise = batch["posterior_noise"]
        if self.num_views is None:
            mean, std = self.moments(batch["pixel_values"])
        else:
            self._fill_cache(batch)
            mean, std = torch.stack([self.cache[view] for view in batch["views"]], dim=1)
        return (mean + std * noise - self.shift) * self.scale

    @torch.no_grad()
    def without_holes(self, batch: dict) -> torch.Tensor:
        """What an inpainting model takes beside the noisy latents: (n B, 1 + C, h, w) float32, 1 in the cells that are to be
        painted, and the latents of the images, grey in their holes.

        Source: diffusers' inpainting pipelines, whose masks are of the nearest pixel.
        """
        holes, noise = batch["holes"], batch["hole_noise"]
        mean, std = self.moments(batch["pixel_values"].masked_fill(holes, 0.0))
        without = (mean + std * noise - self.shift) * self.scale
        factor = holes.shape[-1] // noise.shape[-1]
        return torch.cat([holes[:, :, ::factor, ::factor].float(), without], dim=1)

    def moments(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the posterior, each (B, C, h, w) float32, of (B, 3, H, W) pixels.

        As many images at once as have `PIXELS_AT_ONCE`. Each alone would keep a GPU waiting for kernels to be launched; and a large
        one takes the VAE more memory than the UNet then keeps for it.
        """
        pixel_values = pixel_values.to(self.vae.dtype, memory_format=image_layout(self.vae.device))
        at_once = max(1, PIXELS_AT_ONCE // pixel_values[0, 0].numel())
        posteriors = [self.vae.encode(images).latent_dist for images in pixel_values.split(at_once)]
        mean, std = (torch.cat([getattr(p, name) for p in posteriors]).float() for name in ("mean", "std"))
        return mean, std

    def _fill_cache(self, batch):
        # One by one: which views are missing differs after a resume, and latents must not depend on it.
        for index, view in enumerate(batch["pixel_views"]):
            if view not in self.cache:
                moments = self.moments(batch["pixel_values"][index : index + 1])
                self.cache[view] = torch.cat(moments)  # (2, C, h, w)
        if len(self.cache) == self.num_views and self.vae is not None:
            self.vae = None
            torch.cuda.empty_cache()


def _scaling(vae):
    """What is taken off the latents, and what they are then multiplied by: numbers, or (1, C, 1, 1) where channels differ."""
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return 0.0, vae.config.scaling_factor
    mean, std = (torch.tensor(values, device=vae.device).view(1, -1, 1, 1) for values in (mean, std))
    return mean, vae.config.scaling_factor / std
