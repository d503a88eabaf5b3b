"""The UNet recorded as CUDA graphs trains the same weights, bit for bit. The device is emulated, see `emulated_graphs.py`."""

import copy
import sys

import emulated_graphs
import pytest
import torch
from diffusers import UNet2DConditionModel
from launch import FORKED, PLAIN, SCRIPT, run, torchrun

from custom_diffusion.model.attention import install_trained_projections
from custom_diffusion.model.cuda_graphs import RecordedUNet, record_unet
from custom_diffusion.model.frozen import replace_frozen_layers

LATENTS, FEATURES = (2, 4, 16, 16), (2, 9, 32)
XL_FEATURES, XL_ADDED = (2, 9, 72), {"text_embeds": (2, 24), "time_ids": (2, 6)}
EMULATED = """
import runpy, sys
sys.path.insert(0, {tests!r})
import emulated_graphs
import custom_diffusion.model.cuda_graphs
emulated_graphs.install()
custom_diffusion.model.cuda_graphs.device_problems = lambda device: []
sys.argv[0] = {script!r}
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    print("replays:", emulated_graphs.EmulatedGraph.replays)
"""


@pytest.fixture
def unet(tiny_model):
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").train()
    install_trained_projections(unet, "crossattn")
    replace_frozen_layers(unet)
    return unet


def train(unet, predict, *, set_to_none):
    """Three optimizer steps of two batches each: all trained values, and the gradients of the features."""
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for batch in range(6):
        latents, target = torch.randn((2, *LATENTS), generator=generator).to(unet.dtype)
        latents = latents.to(memory_format=torch.channels_last)
        features = torch.randn(FEATURES, generator=generator).to(unet.dtype).requires_grad_()
        timesteps = torch.randint(1000, LATENTS[:1], generator=generator)
        (predict(latents, timesteps, features) - target).float().square().mean().backward()
        seen.append(features.grad.clone())
        if batch % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    return seen + [parameter.detach().clone() for parameter in trained]


def test_replays_with_conditions_beside_the_text_train_the_same_bits(tiny_xl_model, monkeypatch):
    """Pooled features have a gradient, and each batch its own sizes and crops."""
    recorded = UNet2DConditionModel.from_pretrained(tiny_xl_model, subfolder="unet").train()
    install_trained_projections(recorded, "crossattn_kv")
    replace_frozen_layers(recorded)
    plain = copy.deepcopy(recorded)
    with monkeypatch.context() as patched:
        emulated_graphs.install(patched.setattr)
        RecordedUNet(recorded, LATENTS, XL_FEATURES, XL_ADDED, features_need_grad=True)
    replays, results = emulated_graphs.EmulatedGraph.replays, []
    for unet in (plain, recorded):
        generator, seen = torch.Generator().manual_seed(0), []
        for _ in range(2):
            latents = torch.randn(LATENTS, generator=generator).to(memory_format=torch.channels_last)
            text = [
                torch.randn(s, generator=generator).requires_grad_() for s in (XL_FEATURES, XL_ADDED["text_embeds"])
            ]
            added = {"text_embeds": text[1], "time_ids": 512 * torch.rand(XL_ADDED["time_ids"], generator=generator)}
            timesteps = torch.randint(1000, LATENTS[:1], generator=generator)
            pred = unet(latents, timesteps, text[0], added_cond_kwargs=added, return_dict=False)[0]
            seen.append(pred.detach().clone())
            pred.square().mean().backward()
            seen += [features.grad.clone() for features in text]
        results.append(seen + [p.grad for p in unet.parameters() if p.requires_grad])
    assert emulated_graphs.EmulatedGraph.replays == replays + 4
    assert not torch.equal(results[0][0], results[0][3])
    assert all(torch.equal(result, wanted) for result, wanted in zip(*results, strict=True))


def record(unet, monkeypatch, **options):
    with monkeypatch.context() as patched:
        emulated_graphs.install(patched.setattr)
        return record_unet(unet, LATENTS, FEATURES, features_need_grad=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_replays_train_the_same_bits(unet, monkeypatch, dtype, checkpointing):
    for name, parameter in unet.named_parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
        elif name.endswith("weight"):
            assert parameter.dtype == torch.float32
    plain = copy.deepcopy(unet)
    expected = train(plain, lambda *batch: plain(*batch, return_dict=False)[0], set_to_none=True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    replays = emulated_graphs.EmulatedGraph.replays
    with monkeypatch.context() as patched:
        emulated_graphs.install(patched.setattr)
        recorded = RecordedUNet(unet, LATENTS, FEATURES, features_need_grad=True)
    results = train(unet, lambda *batch: unet(*batch, return_dict=False)[0], set_to_none=True)
    assert emulated_graphs.EmulatedGraph.replays == replays + 12
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
    recorded.remove()
    assert unet.forward.__func__ is UNet2DConditionModel.forward


def test_freed_gradients_would_be_overwritten(unet, monkeypatch):
    """Why gradients stay where they are: this is what the emulation, like a GPU, does to those that do not."""
    plain = copy.deepcopy(unet)
    expected = train(plain, lambda *batch: plain(*batch, return_dict=False)[0], set_to_none=True)
    results = train(unet, record(unet, monkeypatch), set_to_none=True)
    assert not all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))


def test_nothing_is_read_while_recording(unet, monkeypatch):
    """A GPU refuses it: numbers that the CPU reads would stay those of the recording."""

    def read_timestep(module, inputs):
        inputs[1][0].item()

    unet.register_forward_pre_hook(read_timestep)
    with pytest.raises(RuntimeError, match="must not wait"):
        record(unet, monkeypatch)


@pytest.fixture
def emulated_script(tmp_path):
    script = tmp_path / "emulated.py"
    script.write_text(EMULATED.format(tests=str(emulated_graphs.__file__).rsplit("/", 1)[0], script=SCRIPT))
    return str(script)


def test_whole_run(tmp_path, run_arguments, emulated_script, trained_difference):
    """With pictures, checkpoints, accumulation and a batch of two pictures of each kind."""
    arguments = run_arguments | {
        "gradient_accumulation_steps": 2, "validation_prompt": "a <new1> cat", "num_validation_images": 1,
        "validation_steps": 2, "checkpointing_steps": 3,
    }  # fmt: skip
    run(PLAIN, arguments | {"output_dir": tmp_path / "plain"}, tmp_path / "plain.log").ok()
    recorded = arguments | {"output_dir": tmp_path / "recorded", "cuda_graphs": True}
    output = run((sys.executable, emulated_script), recorded, tmp_path / "recorded.log").ok()
    assert f"replays: {2 * 2 * 5}" in output  # forward and backward, of two batches, in five steps
    assert trained_difference(tmp_path / "plain", tmp_path / "recorded") == 0
    assert trained_difference(tmp_path / "plain/checkpoint-3", tmp_path / "recorded/checkpoint-3") == 0


def test_two_processes(tmp_path, run_arguments, emulated_script, trained_difference):
    launcher = torchrun(2)[:-1]
    run((*launcher, SCRIPT), run_arguments | {"output_dir": tmp_path / "plain"}, tmp_path / "plain.log").ok()
    recorded = run_arguments | {"output_dir": tmp_path / "recorded", "cuda_graphs": True}
    output = run((*launcher, emulated_script), recorded, tmp_path / "recorded.log").ok()
    assert output.count("replays: 10") == 2
    assert trained_difference(tmp_path / "plain", tmp_path / "recorded") == 0


def test_without_a_gpu_it_is_one_line(tmp_path, run_arguments):
    failed = run(FORKED, run_arguments | {"output_dir": tmp_path / "out", "cuda_graphs": True}, tmp_path / "log")
    assert failed.status == 2
    assert failed.messages == ["--cuda_graphs: needs a CUDA device, and this run is on 'cpu'; leave it out"]
    assert not (tmp_path / "out").exists()
