"""Drawing from a shell."""

import numpy as np
import pytest
import torch
from fake_concept import PROMPT, make_concept, open_pipeline, run_tool
from PIL import Image

from custom_diffusion import load_custom_diffusion


@pytest.fixture(scope="module")
def concept(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("concept")
    make_concept(folder, tiny_model)
    return folder


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_draws_what_the_pipeline_draws(concept, tiny_model, tmp_path, capsys):
    output = tmp_path / "new" / "cat.png"
    run_tool(
        "generate",
        "--weights",
        concept,
        "--prompt",
        PROMPT,
        "--output",
        output,
        "--num_inference_steps",
        3,
        "--seed",
        5,
    )
    pipe = open_pipeline(tiny_model)

    def image():
        random = torch.Generator().manual_seed(5)
        return np.asarray(pipe(PROMPT, num_inference_steps=3, guidance_scale=6.0, generator=random).images[0]).astype(
            int
        )

    base = image()
    load_custom_diffusion(pipe, concept)
    assert np.array_equal(pixels(output), image())
    assert np.abs(pixels(output) - base).max() > 1
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
