"""The memory of a step, counted without a step: as much as real tensors take, for the models that people have."""

import json
import shutil

import pytest
import torch
from fake_concept import run_tool
from torch._subclasses.fake_tensor import FakeTensorMode

from custom_diffusion import memory
from custom_diffusion.errors import InputError
from custom_diffusion.model.attention import install_trained_projections
from custom_diffusion.model.frozen import replace_frozen_layers
from custom_diffusion.model.loading import load_models
from custom_diffusion.model.source import ModelSource
from custom_diffusion.tools.memory import PUBLISHED, published, report
from custom_diffusion.training.latents import LatentEncoder
from custom_diffusion.training.step_memory import (
    StepMemory,
    StepSettings,
    count_passes,
    count_step,
    fake_unet,
    state_bytes,
)

ONE_AND_ONE = {"train_batch_size": 1, "with_prior_preservation": True, "mixed_precision": "bf16"}


@pytest.fixture(scope="module")
def counted():
    """Stable Diffusion 1 at 512 pixels with checkpointing, which is counted in half the time."""
    return memory("sd1", **ONE_AND_ONE, gradient_checkpointing=True)


def test_stable_diffusion_1(counted):
    """Against numbers that were counted by other means before."""
    trained = 19_169_280 + 768
    assert counted.unet == 2 * 859_520_964 + 2 * 19_169_280
    assert counted.gradients == 4 * trained and counted.optimizer == 8 * trained
    assert counted.kept == pytest.approx(0.18e9, rel=0.02)
    assert counted.kept < counted.passes < 0.4e9
    assert counted.text == pytest.approx(2 * 123.1e6, rel=0.1)
    assert counted.vae == 2 * 34_163_664
    assert counted.total == sum((counted.unet, counted.text, counted.vae, counted.optimizer)) + max(
        counted.gradients + counted.passes, counted.encoding
    )


def test_sizes_of_published_models():
    for name, size in (("sd1", 859_520_964), ("sd2", 865_910_724), ("sdxl", 2_567_463_684)):
        settings = StepSettings(1, 1, None, "crossattn_kv", "bf16", False, False)
        with FakeTensorMode():
            unet = fake_unet(ModelSource(str(PUBLISHED / name)), settings, torch.bfloat16)
        assert sum(parameter.numel() for parameter in unet.parameters()) == size
    assert published() == ["sd1", "sd2", "sdxl"]


def test_kept_tensors_are_those_of_a_real_pass(tiny_model):
    """The same numbers from real tensors on real memory."""
    settings = StepSettings(2, 4, 64, "crossattn", "no", False, False)
    source = ModelSource(str(tiny_model))
    step = count_step(source, settings)
    unet, _, vae = load_models(source, torch.float32, torch.device("cpu"))
    install_trained_projections(unet, "crossattn")
    replace_frozen_layers(unet.train())
    latents = torch.zeros(4, 4, 16, 16)
    features = torch.zeros(4, 16, 32, requires_grad=True)
    real = count_passes(lambda: unet(latents, torch.zeros(4), features, return_dict=False)[0], [unet])
    assert step.kept == pytest.approx(real.kept, rel=0.01)
    assert step.passes == pytest.approx(real.peak, rel=0.05)
    assert step.unet == sum(parameter.nbytes for parameter in unet.parameters())
    assert step.vae == sum(parameter.nbytes for parameter in vae.parameters())


def test_what_is_freed_counts_no_more():
    weight = torch.nn.Parameter(torch.ones(1000))
    module = torch.nn.Module()
    module.weight = weight

    def predict():
        for _ in range(5):
            torch.ones(50_000)
        return (weight * 2).sin().sum()

    counted = count_passes(predict, [module])
    assert counted.kept == 4000  # the sine's input; the weight itself is not counted
    assert 200_000 <= counted.peak < 220_000
    assert weight.grad is None


def test_only_so_many_pixels_are_encoded_at_once(tiny_model, monkeypatch):
    """A large image takes the VAE more memory than the UNet keeps for it."""
    vae = load_models(ModelSource(str(tiny_model)), torch.float32, torch.device("cpu"))[2]

    def peak(num_images):
        pixels = torch.zeros(num_images, 3, 64, 64)
        with torch.no_grad():
            return count_passes(lambda: LatentEncoder(vae, None).moments(pixels)[0], [vae]).peak

    together = peak(2)
    monkeypatch.setattr("custom_diffusion.training.latents.PIXELS_AT_ONCE", 2 * 64 * 64)
    assert peak(1) * 1.8 < together <= peak(4) < 1.5 * together


def test_8_bit_states_have_a_byte_and_a_scale_for_each_block():
    large, small = torch.nn.Parameter(torch.zeros(256 * 100)), torch.nn.Parameter(torch.zeros(768))
    assert state_bytes(large, use_8bit_adam=True) == 2 * (25_600 + 4 * 100)
    assert state_bytes(large, use_8bit_adam=False) == 8 * 25_600
    assert state_bytes(small, use_8bit_adam=True) == 8 * 768


def test_the_report_says_on_which_cards_it_fits():
    def step(gigabytes):
        return StepMemory(int(gigabytes * 1e9), 0, 0, 0, 0, kept=0, passes=0, encoding=0)

    assert "fits cards of 8 GB and more" in report(step(7.2))
    assert "fits cards of 12 GB and more" in report(step(7.4))
    assert "fits no card of 8, 12, 16, 24 GB" in report(step(23.4))
    training = report(StepMemory(1, 1, 1, 1, int(1e9), int(2e9), int(3e9), int(3e9)))
    assert "encoding" not in training and "while it runs, besides" in training
    encoding = report(StepMemory(1, 1, 1, 1, int(1e9), int(2e9), int(3e9), int(5e9)))
    assert "encoding images" in encoding and "  5.00 GB" in encoding and "kept" not in encoding


def test_only_the_configuration_is_read(tiny_model, tmp_path, capsys):
    folder = tmp_path / "configurations"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer", "scheduler"))
    run_tool("memory", "--model", folder, "--resolution", 64, "--freeze_model", "crossattn", "--use_8bit_adam")
    assert "fits cards of 8 GB and more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            ["--model", "./nowhere"],
            "--model: folder './nowhere' does not exist; give a folder, a Hub id or sd1, sd2, sdxl",
        ),
        (["--model", "sd1", "--train_batch_size", "0"], "--train_batch_size: 0 must be 1 or more"),
        (["--model", "sd1", "--resolution", "100"], "--resolution: 100 is not a multiple of 8"),
    ],
)
def test_bad_input_is_one_line(flags, line, capsys):
    with pytest.raises(SystemExit) as ended:
        run_tool("memory", *flags)
    assert ended.value.code == 2
    (told,) = [told for told in capsys.readouterr().err.splitlines() if "error: " in told]
    assert told.endswith(line)


def test_a_configuration_that_makes_no_unet_is_told(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"down_block_types": ["NoSuchBlock", "DownBlock2D"]}))
    with pytest.raises(InputError, match=r"cannot be read as a diffusers model \(NoSuchBlock"):
        memory(folder, resolution=64)
