"""The trained part of the UNet: projections of its cross-attention."""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from custom_diffusion.weights.format import cross_attention_names

# --freeze_model -> projections that are trained
TRAINED_PROJECTIONS = {
    "crossattn_kv": ("to_k", "to_v"),
    "crossattn": ("to_q", "to_k", "to_v", "to_out.0"),
}


class TrainedLinear(nn.Linear):
    """A linear layer whose float32 weights are applied in the precision of its input.

    With `detach_start_token`, no gradient flows through the first token of the sequence.
    """

    def __init__(self, linear: nn.Linear, detach_start_token: bool):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight = nn.Parameter(linear.weight.detach().float())
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().float())
        self.detach_start_token = detach_start_token

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, T, in_features) -> (B, T, out_features), both in the input's dtype."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        output = F.linear(input, self.weight.to(input.dtype), bias)
        if self.detach_start_token and output.requires_grad:
            # One copy; masking with ones and zeros, as usually done, takes six passes.
            output = torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
        return output


def install_trained_projections(unet: UNet2DConditionModel, freeze_model: str) -> None:
    """Freeze the UNet, then replace its trained projections by `TrainedLinear` with the same weights."""
    unet.requires_grad_(False)
    for name in cross_attention_names(unet):
        for projection in TRAINED_PROJECTIONS[freeze_model]:
            path = f"{name}.{projection}"
            linear = TrainedLinear(unet.get_submodule(path), detach_start_token=projection in ("to_k", "to_v"))
            _replace(unet, path, linear)


def remove_trained_projections(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """Put ordinary linear layers back, filled with NaN: whoever uses the UNet must load weights into them first."""
    for path in [path for path, _ in _trained_modules(unet)]:  # each goes before the next one is replaced
        trained = unet.get_submodule(path)
        plain = nn.Linear(
            trained.in_features,
            trained.out_features,
            trained.bias is not None,
            device=trained.weight.device,
            dtype=dtype,
        ).requires_grad_(False)
        for parameter in plain.parameters():
            parameter.fill_(torch.nan)
        _replace(unet, path, plain)


def trained_tensors(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in the UNet, for example "...attn2.to_k.weight"."""
    return {
        f"{path}.{name}": parameter
        for path, module in _trained_modules(unet)
        for name, parameter in module.named_parameters()
    }


def _trained_modules(unet):
    return [(name, module) for name, module in unet.named_modules() if isinstance(module, TrainedLinear)]


def _replace(unet, path, module):
    parent, _, child = path.rpartition(".")
    setattr(unet.get_submodule(parent), child, module)
