"""Exports are proved by loading them with diffusers alone and comparing pictures with `load_custom_diffusion`."""

import os
import re
import stat

import pytest
import safetensors.torch
import torch
from fake_concept import draw, make_concept, open_pipeline, run_tool

from custom_diffusion import load_custom_diffusion
from custom_diffusion.tools.export import LORA_FILE
from custom_diffusion.weights.format import read_weights


@pytest.fixture(scope="module")
def concept(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("concept")
    make_concept(folder, tiny_model)
    return folder


@pytest.fixture(scope="module")
def picture(concept, tiny_model):
    """What `load_custom_diffusion` draws; far from what the base model draws."""
    pipe = open_pipeline(tiny_model)
    base = draw(pipe)
    load_custom_diffusion(pipe, concept)
    image = draw(pipe)
    assert abs(image - base).max() > 10
    return image


def run(weights, output, *flags):
    run_tool("export", weights, "--output", output, *flags)
    return output


def test_whole_pipeline_draws_the_same_picture(concept, picture, tmp_path):
    run(concept, tmp_path / "model", "--to", "pipeline")
    assert abs(draw(open_pipeline(tmp_path / "model")) - picture).max() < 1
    assert not (tmp_path / "model" / "custom_diffusion_config.json").exists()


def test_full_rank_lora_draws_the_same_picture(concept, picture, tiny_model, tmp_path):
    run(concept, tmp_path / "lora", "--to", "lora", "--share", "1")
    pipe = open_pipeline(tiny_model)
    pipe.load_lora_weights(tmp_path / "lora", weight_name=LORA_FILE)
    pipe.load_textual_inversion(tmp_path / "lora", weight_name="<new1>.safetensors")
    assert abs(draw(pipe) - picture).max() < 1


def test_lower_ranks_come_nearer_the_more_they_keep(concept, picture, tiny_model, tmp_path):
    errors = []
    for flags in (("--rank", "1"), ("--share", "0.8"), ("--share", "0.99")):
        folder = run(concept, tmp_path / flags[1], "--to", "lora", *flags)
        pipe = open_pipeline(tiny_model)
        pipe.load_lora_weights(folder, weight_name=LORA_FILE)
        pipe.load_textual_inversion(folder, weight_name="<new1>.safetensors")
        errors.append(abs(draw(pipe) - picture).mean())
    assert errors[0] > errors[1] > errors[2]


def test_layers_of_different_rank_keep_the_share_they_should(concept, tiny_model, tmp_path):
    folder, pipe = run(concept, tmp_path / "lora", "--to", "lora", "--share", "0.9"), open_pipeline(tiny_model)
    pipe.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name="cat")
    trained, ranks = read_weights(concept).tensors, set()
    for name, tensor in trained.items():
        layer = pipe.unet.get_submodule(name.removesuffix(".weight"))
        change = tensor - layer.base_layer.weight
        error = (change - layer.get_delta_weight("cat")).norm() / change.norm()
        ranks.add(layer.r["cat"])
        assert error**2 < 0.1 + 1e-5
    assert len(ranks) > 1


def test_webui_files_hold_the_same(concept, picture, tiny_model, tmp_path):
    run(concept, tmp_path / "my-cat", "--to", "a1111", "--share", "1")
    files = sorted(p.relative_to(tmp_path / "my-cat").as_posix() for p in (tmp_path / "my-cat").rglob("*.*"))
    assert files == ["Lora/my-cat.safetensors", "embeddings/new1.safetensors"]
    lora = safetensors.torch.load_file(tmp_path / "my-cat" / "Lora" / "my-cat.safetensors")
    # The names of kohya's trainer, which A1111, Forge and ComfyUI map to their own modules.
    name = r"lora_unet_(down_blocks_0|mid_block|up_blocks_1)_attentions_[0-9]_transformer_blocks_0_attn2_to_[kv]"
    assert all(re.fullmatch(rf"{name}\.(lora_up\.weight|lora_down\.weight|alpha)", key) for key in lora)
    embedding = safetensors.torch.load_file(tmp_path / "my-cat" / "embeddings" / "new1.safetensors")
    assert list(embedding) == ["emb_params"] and embedding["emb_params"].shape == (1, 32)
    pipe = open_pipeline(tiny_model)
    pipe.load_lora_weights(tmp_path / "my-cat" / "Lora", weight_name="my-cat.safetensors")
    pipe.load_textual_inversion(tmp_path / "my-cat" / "embeddings", weight_name="new1.safetensors", token="<new1>")
    assert abs(draw(pipe) - picture).max() < 1


def test_all_of_the_cross_attention_but_its_biases(tiny_model, tmp_path, capsys):
    weights = make_concept(tmp_path / "faces", tiny_model, crossattn=True)
    run(tmp_path / "faces", tmp_path / "lora", "--to", "lora", "--share", "1")
    assert "cannot hold the 4 trained biases of to_out" in capsys.readouterr().err
    exact, pipe = open_pipeline(tiny_model), open_pipeline(tiny_model)
    load_custom_diffusion(exact, tmp_path / "faces")
    pipe.load_lora_weights(tmp_path / "lora", weight_name=LORA_FILE)
    pipe.load_textual_inversion(tmp_path / "lora", weight_name="<new1>.safetensors")
    assert abs(draw(pipe) - draw(exact)).max() > 1  # the biases are missing, as said,
    with torch.no_grad():
        for name in (name for name in weights.tensors if name.endswith("bias")):
            pipe.unet.get_submodule(name.removesuffix(".bias")).base_layer.bias.copy_(weights.tensors[name])
    assert abs(draw(pipe) - draw(exact)).max() < 1  # and nothing else is
    run(tmp_path / "faces", tmp_path / "model", "--to", "pipeline")
    assert abs(draw(open_pipeline(tmp_path / "model")) - draw(exact)).max() < 1


def test_files_have_ordinary_permissions(concept, tmp_path):
    umask = os.umask(0o022)
    try:
        run(concept, tmp_path / "webui", "--to", "a1111")
        run(concept, tmp_path / "model", "--to", "pipeline")
    finally:
        os.umask(umask)
    for path in [
        tmp_path / "webui",
        tmp_path / "model",
        *(tmp_path / "webui").rglob("*"),
        *(tmp_path / "model").rglob("*"),
    ]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


@pytest.mark.parametrize("name", ["cat:v2", "cat=2", "a>b"])
def test_names_that_would_end_a_prompt_are_refused(concept, tmp_path, capsys, name):
    with pytest.raises(SystemExit):
        run(concept, tmp_path / name, "--to", "a1111")
    assert "--output: A1111 cannot read" in capsys.readouterr().err
    assert run(concept, tmp_path / name, "--to", "lora").is_dir()


def test_token_that_is_an_ordinary_word_without_its_brackets(tiny_model, tmp_path, capsys):
    make_concept(tmp_path / "concept", tiny_model, token="<pot>", class_prompt="pot")
    run(tmp_path / "concept", tmp_path / "webui", "--to", "a1111")
    assert "<pot> becomes 'pot', an ordinary word" in capsys.readouterr().err
    make_concept(tmp_path / "other", tiny_model, token="<new1>")
    run(tmp_path / "other", tmp_path / "webui2", "--to", "a1111")
    assert "ordinary word" not in capsys.readouterr().err
