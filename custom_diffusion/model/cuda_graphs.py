"""The UNet's forward and backward pass as CUDA graphs: recorded once, then replayed as a whole.

A small batch keeps a fast GPU waiting for the CPU, which launches some thousands of kernels a step. A replay is one launch, of
the same kernels.
"""

import warnings
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from custom_diffusion.model.loading import image_layout


def device_problems(device: torch.device) -> list[str]:
    """A line if nothing can be recorded there."""
    if device.type == "cuda":
        return []
    return [f"--cuda_graphs: needs a CUDA device, and this run is on '{device.type}'; leave it out"]


class RecordedUNet:
    """Puts a recording of the UNet's training passes in the place of its `forward`, until `remove`.

    Without gradients (validation, checks) the UNet computes as before. Nothing else of a run need know: gradients that the
    optimizer has freed are made anew before a replay adds to them.

    Args:
        latents_shape, features_shape, added_shapes, features_need_grad: as in `record_unet`.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        latents_shape: tuple,
        features_shape: tuple,
        added_shapes: dict[str, tuple] | None = None,
        *,
        features_need_grad: bool,
    ):
        if unet.is_gradient_checkpointing:
            unet.enable_gradient_checkpointing(_checkpoint)
        self.unet = unet
        self._trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self._forward = unet.forward
        self._replay = record_unet(
            unet, latents_shape, features_shape, added_shapes, features_need_grad=features_need_grad
        )
        unet.forward = self._predict

    def _predict(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return (self._replay(*args, kwargs.get("added_cond_kwargs")),)

    def remove(self) -> None:
        """Let the UNet compute by itself again, and free the recording as soon as no prediction of it is left."""
        del self.unet.forward
        self._replay = None


def _checkpoint(module, *args):
    """As diffusers does it, but without keeping the state of the random numbers, which a recording must not ask for.

    Nothing in the UNet is random.
    """
    return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False)


def record_unet(
    unet: UNet2DConditionModel,
    latents_shape: tuple,
    features_shape: tuple,
    added_shapes: dict[str, tuple] | None = None,
    *,
    features_need_grad: bool,
) -> Callable[..., torch.Tensor]:
    """Record a prediction and its gradients.

    Every trained parameter gets a gradient of zeros, and must have one whenever the recording is replayed: without it,
    autograd would take the recorded gradient itself, which the next replay overwrites, and accumulating several would go wrong.

    Args:
        unet: on a CUDA device; its parameters may change their values from now on, not their places.
        latents_shape: (B, C, h, w) of every batch. features_shape: (B, T, D).
        added_shapes: of `Family.added_conditions`, by name.
        features_need_grad: whether text features, pooled ones included, are trained.
    Returns:
        (noisy latents, timesteps, text features, added conditions or None) -> (B, C, h, w), for training batches of these
        shapes only. The prediction is overwritten by the next one.
    """
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    names = list(added_shapes or {})

    def predict(noisy_latents, timesteps, features, *rest):
        added = dict(zip(names, rest)) or None
        values = dict(zip(trained, rest[len(names) :]))
        batch = (noisy_latents, timesteps, features)
        return functional_call(unet, values, batch, {"added_cond_kwargs": added, "return_dict": False})[0]

    def text(shape):
        return torch.zeros(shape, dtype=unet.dtype, device=unet.device, requires_grad=features_need_grad)

    latents = torch.zeros(latents_shape, dtype=unet.dtype, device=unet.device)
    samples = (
        latents.to(memory_format=image_layout(unet.device)),  # as the VAE leaves them
        torch.zeros(latents_shape[0], dtype=torch.int64, device=unet.device),
        text(features_shape),
        *(
            torch.zeros(shape, device=unet.device) if name == "time_ids" else text(shape)
            for name, shape in (added_shapes or {}).items()
        ),
    )
    # The parameters are arguments so that their gradients are recorded too. Other tensors over the same memory stand for
    # them meanwhile: autograd ties a parameter to the stream that it first meets it on, which must not be the recording's.
    aliases = [parameter.detach().requires_grad_() for parameter in trained.values()]
    with warnings.catch_warnings():
        # The aliases are met on one stream in the warm-up, on another in the recording, and never again.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        replay = torch.cuda.make_graphed_callables(predict, (*samples, *aliases))
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)

    def replayed(noisy_latents, timesteps, features, added=None):
        return replay(noisy_latents, timesteps, features, *(added[name] for name in names), *trained.values())

    return replayed
