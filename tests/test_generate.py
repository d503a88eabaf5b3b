"""Drawing from a shell."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from fake_concept import PROMPT, make_concept, open_pipeline, run_tool
from PIL import Image

from custom_diffusion import load_custom_diffusion
from custom_diffusion.files import CONFIG_NAME


@pytest.fixture(scope="module")
def concept(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("concept")
    make_concept(folder, tiny_model)
    return folder


@pytest.fixture(scope="module")
def concept_of_any(any_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("concept")
    make_concept(folder, any_model)
    return folder


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def differ(image, other):
    """In grey levels."""
    return np.abs(image - other).max()


def rounding(model):
    """Grey levels: XL's products of a matrix and one row round otherwise where diffusers has laid the matrix elsewhere in memory."""
    return int(model.name == "tiny-xl")


def test_draws_what_the_pipeline_draws(concept_of_any, any_model, tmp_path, capsys):
    output = tmp_path / "new" / "cat.png"
    run_tool(
        "generate",
        "--weights",
        concept_of_any,
        "--prompt",
        PROMPT,
        "--output",
        output,
        "--num_inference_steps",
        3,
        "--seed",
        5,
    )
    pipe = open_pipeline(any_model)

    def image():
        random = torch.Generator().manual_seed(5)
        return np.asarray(pipe(PROMPT, num_inference_steps=3, guidance_scale=6.0, generator=random).images[0]).astype(
            int
        )

    base = image()
    load_custom_diffusion(pipe, concept_of_any)
    assert differ(pixels(output), image()) <= rounding(any_model)
    assert differ(pixels(output), base) > 5
    assert capsys.readouterr().out.strip() == str(output)
    assert [p.name for p in output.parent.iterdir()] == ["cat.png"]


def test_several_prompts_and_pictures_have_names_and_seeds(concept, tmp_path):
    args = ["--weights", str(concept), "--prompt", PROMPT, "--prompt", "a cat", "--num_images", "2", "--output", str(tmp_path / "p"),
            "--num_inference_steps", "1", "--height", "32", "--width", "64"]  # fmt: skip
    run_tool("generate", *args)
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["0-0.png", "0-1.png", "1-0.png", "1-1.png"]
    assert pixels(tmp_path / "p" / "0-0.png").shape == (32, 64, 3)
    assert not np.array_equal(pixels(tmp_path / "p" / "0-0.png"), pixels(tmp_path / "p" / "0-1.png"))
    run_tool("generate", *args[:6], *args[8:9], tmp_path / "q", *args[10:], "--seed", 43)
    assert np.array_equal(pixels(tmp_path / "q" / "0-0.png"), pixels(tmp_path / "p" / "0-1.png"))


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "webp", "png"])
def test_every_format_is_written(concept, tmp_path, suffix):
    output = tmp_path / f"cat.{suffix}"
    run_tool("generate", "--weights", concept, "--prompt", "a cat", "--output", output, "--num_inference_steps", 1)
    with Image.open(output) as image:
        assert image.format == {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}[suffix.lower()]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--output", "cat.tiff"], "--output: cannot write .tiff; name a file that ends in .png"),
        (["--output", "x", "--seed", "-1"], "--seed: -1 must be 0 to"),
        (["--output", "x", "--seed", str(2**64)], "--seed: 18446744073709551616 must be 0 to"),
        (["--output", "x", "--guidance_scale", "inf"], "--guidance_scale: inf must be a finite number"),
        (["--output", "x", "--num_inference_steps", "5000"], "--num_inference_steps: 5000 is more than the model's 1000"),
        (["--output", "x", "--negative_prompt", "<new9>"], "--negative_prompt: '<new9>' has <new9>, but the weights bring <new1>"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_told_before_anything_is_drawn(concept, tmp_path, monkeypatch, capsys, flags, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_tool("generate", "--weights", concept, "--prompt", "a cat", *flags)
    assert end.value.code == 2 and expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_scale_is_that_of_loading(concept_of_any, any_model, tmp_path):
    flags = ("--prompt", PROMPT, "--num_inference_steps", 2, "--seed", 0)
    run_tool("generate", "--weights", concept_of_any, "--scale", 0.5, "--output", tmp_path / "half.png", *flags)
    pipe = open_pipeline(any_model)
    load_custom_diffusion(pipe, concept_of_any, scale=0.5)
    image = pipe(PROMPT, num_inference_steps=2, guidance_scale=6.0, generator=torch.Generator().manual_seed(0)).images[
        0
    ]
    assert differ(pixels(tmp_path / "half.png"), np.asarray(image)) <= rounding(any_model)


def test_a_base_model_that_has_gone_is_not_blamed_on_the_hub(tiny_model, tmp_path, capsys):
    make_concept(tmp_path / "cat", tiny_model)
    settings = tmp_path / "cat" / CONFIG_NAME
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model": "/gone/model"}))
    with pytest.raises(SystemExit):
        run_tool("generate", "--weights", tmp_path / "cat", "--prompt", "a", "--output", tmp_path / "x.png")
    assert "--model: the weights were trained on '/gone/model', which is not there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def overflowing(tiny_xl_model, tmp_path_factory):
    """A concept of a model whose VAE, like SDXL's, makes larger numbers than fp16 can hold."""
    folder = tmp_path_factory.mktemp("xl")
    model = shutil.copytree(tiny_xl_model, folder / "model")
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["decoder.conv_in.weight"] *= 1e5
    assert tensors["decoder.conv_in.weight"].abs().max() < 65504  # it can itself be held
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    make_concept(folder / "cat", model)
    return model, folder / "cat"


def test_a_vae_that_overflows_decodes_in_full_precision(overflowing, tmp_path):
    model, concept = overflowing
    flags = ("--prompt", PROMPT, "--num_inference_steps", 1, "--negative_prompt", "a pot")
    run_tool("generate", "--weights", concept, "--precision", "fp16", "--output", tmp_path / "half.png", *flags)
    pipe = open_pipeline(model)
    load_custom_diffusion(pipe, concept)
    random = torch.Generator().manual_seed(42)
    image = pipe(PROMPT, negative_prompt="a pot", num_inference_steps=1, guidance_scale=6.0, generator=random).images[0]
    assert np.abs(pixels(tmp_path / "half.png") - np.asarray(image)).mean() < 2
    pipe.to(torch.float16).vae.register_to_config(force_upcast=False)
    black = pipe(PROMPT, num_inference_steps=1, generator=random).images[0]
    assert np.asarray(black).max() == 0  # what it would be otherwise
