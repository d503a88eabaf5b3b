"""Frozen layers that do, and keep for the backward pass, only what is needed. The results stay the same bits."""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import nn


class _Conv2d(torch.autograd.Function):
    """conv2d that keeps the weight alone: autograd would keep the input too, for a weight gradient that nobody wants."""

    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(weight)
        ctx.input_shape, ctx.input_stride = input.shape, input.stride()
        ctx.options = (stride, padding, dilation, False, (0, 0), groups)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        # Only the layout of the input matters here, not its values.
        input = grad_output.new_empty_strided(ctx.input_shape, ctx.input_stride)
        grad_input, _, _ = torch.ops.aten.convolution_backward(
            grad_output, input, weight, None, *ctx.options, (True, False, False)
        )
        return grad_input, None, None, None, None, None, None


class FrozenConv2d(nn.Conv2d):
    """A convolution with the parameters of `conv`, none of which is trained."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, device="meta",
        )  # fmt: skip
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h', w')."""
        return _Conv2d.apply(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _GatedGELU(torch.autograd.Function):
    """x, gate -> x * gelu(gate) of the two halves of the input, which is all that is kept; gelu is computed again."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        hidden, gate = input.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    @staticmethod
    def backward(ctx, grad_output):
        hidden, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        grad_gate = torch.ops.aten.gelu_backward(grad_output * hidden, gate)
        return torch.cat([grad_output * F.gelu(gate), grad_gate], dim=-1)


class FrozenGEGLU(nn.Module):
    """diffusers' `GEGLU` with the projection of `geglu`."""

    def __init__(self, geglu: GEGLU):
        super().__init__()
        self.proj = geglu.proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, dim_in) -> (B, T, dim_out)."""
        return _GatedGELU.apply(self.proj(hidden_states))


def replace_frozen_layers(unet: UNet2DConditionModel) -> None:
    """Put these layers in the place of a frozen UNet's convolutions and gated activations, with the same parameters."""
    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d:
                setattr(parent, name, FrozenConv2d(child))
            elif type(child) is GEGLU:
                setattr(parent, name, FrozenGEGLU(child))
