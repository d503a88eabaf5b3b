"""Frozen layers: the same bits as the layers they replace, with less kept for the backward pass."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU

from custom_diffusion.model.attention import install_trained_projections, trained_tensors
from custom_diffusion.model.frozen import FrozenConv2d, FrozenGEGLU, replace_frozen_layers


@pytest.fixture
def unets(tiny_model):
    plain = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    install_trained_projections(plain, "crossattn")
    slim = copy.deepcopy(plain)
    replace_frozen_layers(slim)
    return plain, slim


def run(unet, dtype=torch.float32, memory_format=torch.contiguous_format):
    """Prediction, gradient of the text features, gradients of the trained parts, and bytes kept for the backward pass."""
    torch.manual_seed(0)
    latents = torch.randn(3, 4, 16, 16, dtype=dtype).contiguous(memory_format=memory_format)
    features = torch.randn(3, 9, unet.config.cross_attention_dim, dtype=dtype, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = unet(latents, torch.tensor([1, 500, 999]), features, return_dict=False)[0]
    size = sum(storage.nbytes() for storage in kept.values())
    prediction.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in trained_tensors(unet).items()}
    return prediction.detach(), {"features": features.grad, **gradients}, size


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_and_less_kept(unets, dtype, memory_format):
    plain, slim = (unet.to(dtype) for unet in unets)
    expected, expected_gradients, kept_before = run(plain, dtype, memory_format)
    prediction, gradients, kept = run(slim, dtype, memory_format)
    assert torch.equal(prediction, expected)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 1
    assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)
    assert all(gradient.any() for gradient in gradients.values())
    assert kept < 0.9 * kept_before


def test_every_convolution_and_gate_is_replaced_with_the_same_parameters(unets):
    plain, slim = unets
    kinds = [type(module) for module in slim.modules()]
    assert torch.nn.Conv2d not in kinds
    assert kinds.count(FrozenConv2d) == sum(type(module) is torch.nn.Conv2d for module in plain.modules())
    assert GEGLU not in kinds and kinds.count(FrozenGEGLU) == sum(type(module) is GEGLU for module in plain.modules())
    assert plain.state_dict().keys() == slim.state_dict().keys()


def test_with_gradient_checkpointing(unets):
    plain, slim = unets
    _, expected, _ = run(plain.train())
    slim.train().enable_gradient_checkpointing()
    _, gradients, _ = run(slim)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
