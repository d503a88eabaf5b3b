"""Frozen layers: the same bits as the layers they replace, with less kept for the backward pass."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU

from custom_diffusion.attention import install_trained_projections, trained_tensors
from custom_diffusion.frozen import FrozenConv2d, FrozenGEGLU, replace_frozen_layers, skip_divisions_by_one


@pytest.fixture
def unets(tiny_model):
    plain = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    install_trained_projections(plain, "crossattn")
    slim = copy.deepcopy(plain)
    replace_frozen_layers(slim)
    skip_divisions_by_one(slim)
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


def test_no_pass_over_a_feature_map_divides_it_by_one(unets):
    def divisions(unet):
        with torch.profiler.profile() as profile, torch.no_grad():
            unet(torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.randn(1, 9, unet.config.cross_attention_dim))
        return sum(event.count for event in profile.key_averages() if event.key == "aten::div")

    plain, slim = unets
    names = ("output_scale_factor", "rescale_output_factor")
    num_factors = sum(getattr(module, name, None) == 1 for module in plain.modules() for name in names)
    assert divisions(plain) - divisions(slim) == num_factors > 10


def test_other_factors_stay(unets):
    plain, _ = unets
    plain.mid_block.resnets[0].output_scale_factor = 2.0
    skip_divisions_by_one(plain)
    assert plain.mid_block.resnets[0].output_scale_factor == 2.0
