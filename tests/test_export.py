"""Exports are proved by loading them with diffusers alone and comparing pictures with `load_custom_diffusion`."""

import os
import re
import resource
import signal
import stat

import pytest
import safetensors.torch
import torch
from fake_concept import draw, make_concept, open_pipeline, run_tool
from tiny import make_model

from custom_diffusion import export, load_custom_diffusion
from custom_diffusion.errors import InputError
from custom_diffusion.model.loading import base_tensors
from custom_diffusion.model.source import ModelSource
from custom_diffusion.tools.export import LORA_FILE, embedding_names, original_name
from custom_diffusion.weights.format import ConceptWeights, read_weights


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


def base_of(weights):
    return base_tensors(ModelSource(weights.config["base_model"]), weights.tensors)


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


def open_lora(path):
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def test_precision_ranks_and_scale_of_a_lora(concept, tmp_path):
    """One alpha for all, full precision only where nothing is left out, and what A1111 tells the model by."""
    for share, dtype in (("1", torch.float32), ("0.9", torch.float16)):
        folder = run(concept, tmp_path / share, "--to", "lora", "--share", share)
        assert sorted(p.name for p in folder.iterdir()) == ["<new1>.safetensors", "pytorch_lora_weights.safetensors"]
        lora, metadata = open_lora(folder / "pytorch_lora_weights.safetensors")
        assert {tensor.dtype for key, tensor in lora.items() if not key.endswith("alpha")} == {dtype}
        ranks = [len(tensor) for key, tensor in lora.items() if key.endswith("lora_down.weight")]
        assert {float(tensor) for key, tensor in lora.items() if key.endswith("alpha")} == {max(ranks)}
        assert metadata == {
            "format": "pt", "ss_network_module": "networks.lora", "ss_v2": "False", "ss_base_model_version": "sd_v1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
        }  # fmt: skip
    assert torch.equal(
        safetensors.torch.load_file(folder / "<new1>.safetensors")["<new1>"], read_weights(concept).tokens["<new1>"]
    )


def test_stable_diffusion_2_is_told_by_the_width_of_its_text_features(tmp_path):
    model = make_model(tmp_path / "model", width=1024)
    weights = make_concept(tmp_path / "concept", model)
    export(weights, to="a1111", output=tmp_path / "webui", rank=1)
    _, metadata = open_lora(tmp_path / "webui" / "Lora" / "webui.safetensors")
    assert metadata == {
        "format": "pt", "ss_network_module": "networks.lora", "ss_v2": "True", "ss_base_model_version": "sd_v2"
    }  # fmt: skip


def test_what_was_kept_and_how_it_is_used_is_told(concept, tmp_path):
    weights = read_weights(concept)
    weights.tokens["<new2>"] = torch.ones(32)
    told = export(weights, to="lora", output=tmp_path / "lora", rank=2)
    kept = re.fullmatch(r".*/lora: rank 2, (\d+\.\d\d) % or more of every squared change; (.*)", told)
    changes = [w - b for w, b in zip(weights.tensors.values(), base_of(weights).values())]
    values = [torch.linalg.svdvals(change).square() for change in changes]
    assert float(kept[1]) == pytest.approx(100 * min((v[:2].sum() / v.sum()).item() for v in values), abs=0.01)
    assert kept[2] == "; ".join(
        [f"pipe.load_lora_weights('{tmp_path}/lora', weight_name='{LORA_FILE}')"]
        + [f"pipe.load_textual_inversion('{tmp_path}/lora', weight_name='<new{n}>.safetensors')" for n in (1, 2)]
    )
    told = export(weights, to="a1111", output=tmp_path / "cat-webui")
    assert re.search(r"webui: ranks \d+ to \d+, median \d+, (99.\d\d|100.00) % or more", told)  # 0.99 unless told
    assert told.endswith(
        "copy Lora/ and embeddings/ into the program's folders. A1111, Forge: prompt new1 new2 <lora:cat-webui:1>. "
        "ComfyUI: Load LoRA node, prompt embedding:new1 embedding:new2"
    )
    told = export(weights, to="pipeline", output=tmp_path / "model")
    assert told == f"{tmp_path}/model: draw with DiffusionPipeline.from_pretrained('{tmp_path}/model')"


def test_the_weights_stay_apart_from_the_names_of_files():
    assert embedding_names(["<new1>", "sks", "<>"]) == {"<new1>": "new1", "sks": "sks", "<>": "<>"}
    with pytest.raises(InputError, match="weights: tokens <cat>, cat have the same name without < and >"):
        embedding_names(["<cat>", "cat"])


def test_biases_that_training_left_alone_are_not_warned_of(tiny_model, tmp_path, capsys):
    weights = make_concept(tmp_path / "faces", tiny_model, crossattn=True)
    base = base_of(weights)
    weights.tensors |= {name: base[name] for name in weights.tensors if name.endswith("bias")}
    export(weights, to="lora", output=tmp_path / "same", rank=1)
    assert "biases" not in capsys.readouterr().err
    name = next(name for name in weights.tensors if name.endswith("bias"))
    weights.tensors[name] = base[name] - 0.25
    export(weights, to="lora", output=tmp_path / "lower", rank=1)
    assert "(largest change 0.25)" in capsys.readouterr().err


def test_weights_that_do_not_fit_the_pipeline_are_refused(concept, tmp_path):
    weights = read_weights(concept)
    wrong = ConceptWeights(weights.tensors, {"<new1>": torch.ones(7)}, weights.config)
    with pytest.raises(InputError, match="weights: the concept does not fit the pipeline: the embedding of <new1>"):
        export(wrong, to="pipeline", output=tmp_path / "model")
    assert not (tmp_path / "model").exists()


BAD_FLAGS = [
    (["--to", "lora", "--share", "0"], "--share: 0.0 must be above 0 and at most 1"),
    (["--to", "lora", "--share", "1.01"], "--share: 1.01 must be above 0 and at most 1"),
    (["--to", "pipeline", "--share", "0.5"], "--share: has no meaning with --to pipeline"),
    (["--to", "lora", "--rank", "2", "--share", "0.5"], "not allowed with argument"),
    (["--to", "lora", "--rank", "1.5"], "--rank: invalid int value"),
    (["--to", "ckpt"], "--to: invalid choice"),
    ([], "the following arguments are required: --to"),
]


@pytest.mark.parametrize(("flags", "expected"), BAD_FLAGS)
def test_flags_that_make_no_sense(concept, tmp_path, capsys, flags, expected):
    with pytest.raises(SystemExit) as end:
        run(concept, tmp_path / "new", *flags)
    assert end.value.code == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        run_tool("export", concept, "--to", "lora")
    assert "the following arguments are required: --output" in capsys.readouterr().err


# Two text encoders


@pytest.fixture(scope="module")
def xl_concept(tiny_xl_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl") / "concept"
    make_concept(folder, tiny_xl_model)
    return folder


@pytest.fixture(scope="module")
def xl_picture(xl_concept, tiny_xl_model):
    pipe = open_pipeline(tiny_xl_model)
    base = draw(pipe)
    load_custom_diffusion(pipe, xl_concept)
    image = draw(pipe)
    assert abs(image - base).max() > 10
    return image


def test_lora_and_words_of_two_text_encoders_draw_the_same(xl_concept, xl_picture, tiny_xl_model, tmp_path):
    """By the very code that the command prints."""
    told = export(xl_concept, to="lora", output=tmp_path / "lora", share=1.0)
    pipe = open_pipeline(tiny_xl_model)
    exec(told.split("change; ")[1].replace("; ", "\n"), {"pipe": pipe, "safetensors": safetensors})
    assert abs(draw(pipe) - xl_picture).max() < 1


def test_names_are_those_of_the_original_layout(xl_concept, tmp_path):
    """What A1111 and kohya's programs call the layers of SDXL, whose blocks have two resnets each."""
    names = {
        "down_blocks.1.attentions.0": "input_blocks.4.1", "down_blocks.1.attentions.1": "input_blocks.5.1",
        "down_blocks.2.attentions.0": "input_blocks.7.1", "down_blocks.2.attentions.1": "input_blocks.8.1",
        "mid_block.attentions.0": "middle_block.1",
        **{f"up_blocks.{b}.attentions.{a}": f"output_blocks.{3 * b + a}.1" for b in (0, 1) for a in (0, 1, 2)},
    }  # fmt: skip
    layer = "transformer_blocks.9.attn2.to_k"
    for name, original in names.items():
        assert original_name(f"{name}.{layer}", layers_per_block=2) == f"{original}.{layer}"
    folder = run(xl_concept, tmp_path / "cat-xl", "--to", "a1111")
    lora, metadata = open_lora(folder / "Lora" / "cat-xl.safetensors")
    blocks = {re.fullmatch(r"lora_unet_(\w+)_transformer_blocks_[01]_attn2_to_[kv]\.\S+", key).group(1) for key in lora}
    assert blocks == {"input_blocks_3_1", "middle_block_1", "output_blocks_0_1", "output_blocks_1_1"}
    assert metadata == {
        "format": "pt", "ss_network_module": "networks.lora", "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    }  # fmt: skip
    rows = safetensors.torch.load_file(folder / "embeddings" / "new1.safetensors")
    assert {key: tuple(row.shape) for key, row in rows.items()} == {"clip_l": (1, 32), "clip_g": (1, 40)}
    assert torch.equal(torch.cat([rows["clip_l"], rows["clip_g"]], dim=1)[0], read_weights(xl_concept).tokens["<new1>"])


def test_whole_pipeline_with_two_text_encoders(xl_concept, xl_picture, tmp_path):
    run(xl_concept, tmp_path / "model", "--to", "pipeline")
    assert abs(draw(open_pipeline(tmp_path / "model")) - xl_picture).max() < 1


@pytest.mark.parametrize("to", ["lora", "a1111", "pipeline"])
def test_a_full_disk_is_one_line(to, concept, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(SystemExit) as end:
            run(concept, tmp_path / "new", "--to", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert end.value.code == 1
    assert "custom-diffusion export: error: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
