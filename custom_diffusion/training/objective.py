"""The training objective: pure functions of tensors.

A new term is one function, and a line with its name in `custom_diffusion_losses`.
"""

import torch
from diffusers import DDPMScheduler


def prediction_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet should predict, as the scheduler's configuration says.

    Args:
        latents, noise: (B, C, h, w) float.
        timesteps: (B,) int64.
    Returns:
        (B, C, h, w): the noise, or the velocity.
    """
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


def masked_loss(model_pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Loss of the photos.

    Args:
        model_pred, target: (B, C, h, w) float32.
        mask: (B, 1, h, w), 1 where the photo is, 0 where the canvas is padding; at least one 1 each.
    Returns:
        Scalar: squared error summed over channels and unmasked cells, divided by the number of these cells, averaged over B.
    Source: the reference script's instance loss.
    """
    squared_error = (model_pred - target).square() * mask
    return (squared_error.sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))).mean()


def custom_diffusion_losses(
    model_pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, prior_loss_weight: float
) -> dict[str, torch.Tensor]:
    """Losses of [photos..., class images...], or of photos alone.

    Args:
        model_pred, target: (n B, C, h, w) float; n is 2 with prior preservation, else 1.
        mask: (B, 1, h, w), of the photos.
    Returns:
        Scalars by name. "loss" is what training minimises, the weighted sum of the terms; each of them follows by its own
        name, under which the trackers show it. "prior_loss" is 0 without class images.
    """
    model_pred, target = model_pred.float(), target.float()
    num_photos = mask.shape[0]
    instance_loss = masked_loss(model_pred[:num_photos], target[:num_photos], mask)
    if model_pred.shape[0] == num_photos:
        prior_loss = torch.zeros_like(instance_loss)
    else:
        prior_loss = torch.nn.functional.mse_loss(model_pred[num_photos:], target[num_photos:])
    return {
        "loss": instance_loss + prior_loss_weight * prior_loss,
        "instance_loss": instance_loss,
        "prior_loss": prior_loss,
    }
