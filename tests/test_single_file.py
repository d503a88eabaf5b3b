"""Base models in one file: what such a file is, told from its header, and that it teaches the same as its folder."""

import argparse
import json
import shutil
from dataclasses import replace

import launch
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from fake_concept import run_tool
from hub_server import HubServer
from original_layout import save_single_file, vae_state
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_model, make_vae

from custom_diffusion import compress, export, generate, memory, merge
from custom_diffusion.errors import InputError
from custom_diffusion.families import SUPPORTED
from custom_diffusion.files import CONFIG_NAME
from custom_diffusion.model.loading import base_tensors, empty_unet, load_models, load_pipeline, load_vae
from custom_diffusion.model.source import ModelSource, base_of, check_model
from custom_diffusion.single_file import model_in, read_header, vae_in
from custom_diffusion.tools.memory import add_flags, flag_problems
from custom_diffusion.tools.share import public_config
from custom_diffusion.training.model_card import model_card
from custom_diffusion.weights.format import read_weights

UNET = "model.diffusion_model."


def file_problem(path):
    try:
        model_in(path)
    except ValueError as error:
        return str(error)


def vae_problem(path):
    with pytest.raises(ValueError) as error:
        vae_in(str(path))
    return str(error.value)


def write(path, *names, dtype=torch.float32, metadata=None, **shapes):
    """A file with tensors of these names, of one value each or of a shape."""
    tensors = {name: torch.zeros(1, dtype=dtype) for name in names}
    save_file(
        tensors | {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, path, metadata=metadata
    )
    return path


def parts(channels=4, text=("cond_stage_model.transformer.text_model.final_layer_norm.bias",), vae=True):
    """Names of a whole model, and the shape of its UNet's first convolution."""
    return [*text, *(["first_stage_model.encoder.conv_in.weight"] if vae else [])], {
        f"{UNET}input_blocks.0.0.weight": (8, channels, 3, 3)
    }


CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.x", "cond_stage_model.model.x"
TWO = ("conditioner.embedders.0.transformer.text_model.x", "conditioner.embedders.1.model.x")
REFINER = "conditioner.embedders.0.model.x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([CLIP], {"text_encoder", "tokenizer"}),
        ([OPEN_CLIP], {"text_encoder", "tokenizer"}),
        (TWO, {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"}),
        ([REFINER], {"text_encoder_2", "tokenizer_2"}),
    ],
)
def test_the_parts_of_a_model(text, expected, tmp_path):
    names, shapes = parts(text=text)
    file = read_header(write(tmp_path / "x.safetensors", *names, **shapes))
    assert file.parts.keys() == {"unet", "vae"} | expected
    assert file.what_else() is None
    assert file.may_predict_velocities == (text == [OPEN_CLIP])
    problem = file_problem(str(file.path))
    assert "the refiner of" in problem if text == [REFINER] else problem is None


def test_a_model_without_a_vae_is_one_nonetheless(tmp_path):
    names, shapes = parts(vae=False)
    file = read_header(write(tmp_path / "x.safetensors", *names, **shapes))
    assert "vae" not in file.parts and file.what_else() is None


@pytest.mark.parametrize("channels", [4, 9])
def test_input_channels(channels, tmp_path):
    names, shapes = parts(channels)
    assert read_header(write(tmp_path / "x.safetensors", *names, **shapes)).in_channels == channels


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("v_pred", {}, "v_prediction"),
        ("x", {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("x", {"modelspec.predict_key": "v"}, "v_prediction"),
        ("x", {"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ("x", {"modelspec.prediction_type": "something"}, None),
        ("x", {}, None),
    ],
)
def test_what_a_file_says_that_it_predicts(name, metadata, expected, tmp_path):
    assert read_header(write(tmp_path / "x.safetensors", name, metadata=metadata)).prediction_type == expected


OTHERS = {
    "a LoRA": ["lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight"],
    "a LoRA;": ["unet.down_blocks.1.attentions.0.attn2.to_k.lora_A.weight", "double_blocks.0.img_attn.lora.up.weight"],
    "a LoRA; Stable": ["lora_unet_x.hada_w1_a"],
    "an IP-Adapter": ["image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"],
    "a ControlNet": ["input_hint_block.0.weight"],
    "a ControlNet;": ["control_model.input_blocks.0.0.weight", "cond_stage_model.transformer.text_model.x"],
    "a ControlNet; Stable": ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
    "an AnimateDiff motion module": ["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"],
    "a Flux model": ["double_blocks.0.img_attn.norm.key_norm.scale"],
    "a Flux model;": ["model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "text_encoders.clip_l.x"],
    "a Flux model; Stable": ["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"],
    "a Stable Diffusion 3 model": ["model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"],
    "an AuraFlow model": ["model.double_layers.0.attn.w1q.weight"],
    "a PixArt or Sana model": ["blocks.0.cross_attn.kv_linear.weight"],
    "a PixArt or Sana model;": ["adaln_single.linear.weight"],
    "a Stable Cascade model": ["clip_txt_mapper.weight"],
    "a Playground v2.5 model": [*TWO, "edm_mean", f"{UNET}input_blocks.0.0.weight"],
    "a textual-inversion embedding": ["emb_params"],
    "a textual-inversion embedding;": ["clip_l", "clip_g"],
    "a textual-inversion embedding; Stable": ["<new1>"],
    "trained weights of Custom Diffusion": ["mid_block.attentions.0.attn2.processor.to_k_custom_diffusion.weight"],
    "trained weights of Custom Diffusion,": ["mid_block.attentions.0.attn2.to_k.weight.up"],
    "a UNet without": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
    "a UNet without the": ["down_blocks.0.resnets.0.conv1.weight"],
    "a UNet without the text encoder": ["input_blocks.0.0.weight"],
    "a VAE alone": ["encoder.conv_in.weight", "decoder.conv_in.weight"],
    "a VAE alone;": ["first_stage_model.encoder.conv_in.weight"],
    "a text encoder alone": ["text_model.embeddings.position_embedding.weight"],
    "a text encoder alone;": ["encoder.block.0.layer.0.SelfAttention.k.weight"],
    "no model that is known here (its first tensor is 'fc.weight')": ["fc.weight", "head.weight"],
}


@pytest.mark.parametrize(("expected", "names"), OTHERS.items(), ids=OTHERS)
def test_files_that_are_something_else(expected, names, tmp_path):
    problem = file_problem(str(write(tmp_path / "x.safetensors", *names)))
    assert problem.startswith(f"is {expected}") and problem.endswith(f"; {SUPPORTED}") and "\n" not in problem


@pytest.mark.parametrize(
    ("channels", "what"), [(5, "a depth-to-image"), (7, "an upscaling"), (8, "an InstructPix2Pix")]
)
def test_models_with_other_inputs(channels, what, tmp_path):
    names, shapes = parts(channels)
    problem = file_problem(str(write(tmp_path / "x.safetensors", *names, **shapes)))
    assert problem.startswith(f"is {what} model ({channels} input channels)")


def test_weights_made_smaller_for_drawing(tmp_path):
    names, shapes = parts()
    problem = file_problem(str(write(tmp_path / "x.safetensors", *names, dtype=torch.float8_e4m3fn, **shapes)))
    assert problem.startswith("has weights in F8_E4M3")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.ckpt", b"PK", "is a pickle, which can run code"),
        ("x.pt", b"PK", "is a pickle"),
        ("x.gguf", b"GGUF", "is a file, but no .safetensors"),
        ("x.safetensors", b"", "is damaged (it does not begin as"),
        ("x.safetensors", b"<html>" * 9, "is damaged (it does not begin as"),
        ("x.safetensors", (3).to_bytes(8, "little") + b"[1]", "is damaged (its header is no safetensors header)"),
        ("x.safetensors", (2).to_bytes(8, "little") + b"{", "is damaged (it does not begin as"),
        ("x.safetensors", (2).to_bytes(8, "little") + b"\xff\xff", "is damaged (its header is no"),
    ],
)
def test_files_that_cannot_be_read(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert file_problem(str(tmp_path / name)).startswith(expected)


def test_a_file_that_is_cut_off(tmp_path):
    path = write(tmp_path / "x.safetensors", *parts()[0])
    path.write_bytes(path.read_bytes()[:-1])
    assert file_problem(str(path)).startswith("is damaged (it has ")


def test_a_file_that_is_not_there(tmp_path):
    assert file_problem(str(tmp_path / "x.safetensors")).startswith("is no file that is there")


def test_what_tells_a_file_from_others(tmp_path):
    one = read_header(write(tmp_path / "one.safetensors", *parts()[0], metadata={"a": "b"}))
    moved = read_header(write(tmp_path / "moved.safetensors", *parts()[0], metadata={"a": "b"}))
    other = read_header(write(tmp_path / "one.safetensors", *parts()[0], metadata={"a": "c"}))
    assert one.identity() | {"name": None} == moved.identity() | {"name": None}
    assert one.digest != other.digest and len(one.digest) == 64
    assert json.loads(json.dumps(one.identity())) == one.identity()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["decoder.mid_block.resnets.0.conv1.weight"],
            "is a VAE as diffusers names its weights; give the folder with it",
        ),
        (["lora_unet_x.lora_up.weight"], "has no VAE of Stable Diffusion's kind (it is a LoRA); give a VAE's file"),
        (["input_blocks.0.0.weight"], "has no VAE of Stable Diffusion's kind (it is a UNet without the text encoder"),
        (parts(vae=False), "has no VAE of Stable Diffusion's kind (it is a model without one)"),
    ],
)
def test_files_without_a_vae(names, expected, tmp_path):
    names, shapes = names if isinstance(names, tuple) else (names, {})
    assert vae_problem(write(tmp_path / "x.safetensors", *names, **shapes)).startswith(expected)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_vae_that_cannot_be_read(name, tmp_path):
    (tmp_path / name).write_bytes(b"PK")
    assert vae_problem(tmp_path / name).startswith("is a pickle" if name == "x.pt" else "is damaged")


# Loaded


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tiny_model, tiny_v_model, tiny_xl_model, tmp_path_factory):
    """kind -> (folder, its copy in one file)."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "1.x": (tiny_model, save_single_file(tiny_model, folder / "one.safetensors")),
        "2.x": (tiny_v_model, save_single_file(tiny_v_model, folder / "two.safetensors", open_clip=True)),
        "XL": (tiny_xl_model, save_single_file(tiny_xl_model, folder / "xl.safetensors")),
    }


def parameters(source, dtype=torch.float32):
    unet, text, vae = load_models(source, dtype, CPU)
    modules = {"unet": unet, "vae": vae} | {f"text{i}": encoder for i, encoder in enumerate(text.encoders)}
    assert not any(module.training for module in modules.values())
    return {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}


@pytest.mark.parametrize("kind", ["1.x", "2.x", "XL"])
def test_a_file_has_the_weights_of_its_folder(kind, models):
    folder, file = models[kind]
    shape, scheduler = check_model(ModelSource(str(folder)))
    of_file, of_file_scheduler = check_model(ModelSource(str(file), config_from=str(folder)))
    assert replace(of_file, base_file=None) == shape and of_file_scheduler.config == scheduler.config
    assert of_file.base_file == read_header(file).identity()
    apart, single = parameters(ModelSource(str(folder))), parameters(ModelSource(str(file), config_from=str(folder)))
    assert apart.keys() == single.keys()
    assert all(torch.equal(apart[name], single[name]) for name in apart)


@pytest.mark.parametrize("kind", ["1.x", "XL"])
def test_predictions_do_not_depend_on_where_in_a_file_the_weights_lie(kind, models, tmp_path):
    """For a single image: its products of a matrix and one row are summed in an order that depends on addresses."""
    folder, file = models[kind]
    predicted, places = [], []
    for shift in (0, 8):  # bytes, by which a longer header moves all tensors
        moved = tmp_path / f"{shift}.safetensors"
        save_file(load_file(file), moved, metadata={"format": "pt", "x": " " * shift})
        unet, text, _ = load_models(ModelSource(str(moved), config_from=str(folder)), torch.float32, CPU)
        places.append(unet.conv_in.weight.data_ptr() % 16)
        with torch.no_grad():
            features, pooled = text.encode(["photo of a cat"])
            added = text.family.added_conditions(pooled, torch.tensor([[70.0, 90, 3, 5, 64, 64]]))
            latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            predicted.append(unet(latents, torch.tensor([400]), features, added_cond_kwargs=added).sample)
    assert places[0] != places[1]  # in files, mapped
    assert torch.equal(*predicted)


@pytest.mark.parametrize("kind", ["1.x", "XL"])
def test_half_precision_files_give_full_masters(kind, models, tmp_path):
    """What is trained starts from the file's own values in float32, whatever the rest is cast to."""
    folder, _ = models[kind]
    file = save_single_file(folder, tmp_path / "half.safetensors", torch.float16)
    full = parameters(ModelSource(str(folder)))
    half = parameters(ModelSource(str(file), config_from=str(folder)), torch.bfloat16)
    for name, parameter in half.items():
        rounded = full[name].half()
        if ".attn2." in name or name.startswith("text"):
            assert parameter.dtype == torch.float32 and torch.equal(parameter, rounded.float()), name
        elif name.startswith("unet"):
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, rounded.bfloat16()), name


@pytest.mark.parametrize("kind", ["1.x", "XL"])
def test_the_tools_read_single_tensors_of_a_file(kind, models):
    folder, file = models[kind]
    source = ModelSource(str(file), config_from=str(folder))
    names = [name for name, _ in empty_unet(source).named_parameters() if "attn2.to_k" in name]
    apart, single = base_tensors(ModelSource(str(folder)), names), base_tensors(source, names)
    assert names and apart.keys() == single.keys() and all(torch.equal(apart[name], single[name]) for name in names)


def test_the_memory_of_a_file_is_that_of_its_folder(models):
    folder, file = models["1.x"]
    flags = ["--config_from", str(folder), "--resolution", "64", "--train_batch_size", "1"]
    args = argparse.ArgumentParser()
    add_flags(args)
    args = args.parse_args(["--model", str(file), *flags])
    assert flag_problems(args) == []
    assert memory(file, config_from=str(folder), resolution=64) == memory(folder, resolution=64)


@pytest.mark.parametrize("kind", ["1.x", "2.x", "XL"])
def test_a_file_draws_what_its_folder_draws(kind, models):
    folder, file = models[kind]
    drawn = []
    for source in (ModelSource(str(folder)), ModelSource(str(file), config_from=str(folder))):
        pipe = load_pipeline(source, torch.float32, safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        drawn.append((type(pipe), pipe("a cat", **options).images))
    assert drawn[0][0] is drawn[1][0]
    assert torch.allclose(drawn[0][1], drawn[1][1], atol=1e-4)


# Described


def problems_of(path, **options):
    with pytest.raises(InputError) as error:
        check_model(ModelSource(str(path), flag="--pretrained_model_name_or_path", **options))
    return error.value.problems


def test_a_configuration_of_another_family(models):
    (line,) = problems_of(models["1.x"][1], config_from=str(models["XL"][0]))
    assert line.startswith("--config_from: ") and "is a Stable Diffusion XL model, " in line


def test_a_configuration_of_another_size(models, tmp_path):
    wide = make_model(tmp_path / "wide", width=64)
    lines = problems_of(models["1.x"][1], config_from=str(wide))
    assert [line.split(":")[0] for line in lines] == ["--config_from"]
    assert "describes another model than" in lines[0] and "(64, 64)" not in lines[0]


def test_a_configuration_that_cannot_be_read(models, tmp_path):
    (line,) = problems_of(models["1.x"][1], config_from=str(tmp_path))
    assert line.startswith(f"--config_from: '{tmp_path}' cannot be read as a diffusers model")


def test_without_a_network_the_message_names_the_flag(models):
    (line,) = problems_of(models["1.x"][1])
    assert (
        line.startswith("--config_from: 'stable-diffusion-v1-5/stable-diffusion-v1-5' cannot be read")
        and "\n" not in line
    )


@pytest.mark.parametrize(
    ("channels", "text", "width", "repository"),
    [
        (4, [CLIP], 768, "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (4, [OPEN_CLIP], 1024, "stabilityai/stable-diffusion-2-1"),
        (4, TWO, 2048, "stabilityai/stable-diffusion-xl-base-1.0"),
        (9, [CLIP], 768, "stable-diffusion-v1-5/stable-diffusion-inpainting"),
        (9, [OPEN_CLIP], 1024, "stabilityai/stable-diffusion-2-inpainting"),
        (9, TWO, 2048, "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"),
    ],
)
def test_the_repository_of_a_family(channels, text, width, repository, tmp_path):
    names, shapes = parts(channels, text=text)
    attention = f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    mark = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"  # by which diffusers tells XL
    file = write(
        tmp_path / "x.safetensors", *names, *([mark] if text == TWO else []), **shapes, **{attention: (1, width)}
    )
    assert ModelSource(str(file)).described_by.path == repository


def test_a_file_without_a_vae(models, tmp_path):
    folder, _ = models["1.x"]
    file = save_single_file(folder, tmp_path / "x.safetensors", without=("first_stage_model.",))
    (line,) = problems_of(file, config_from=str(folder))
    assert line.startswith("--pretrained_vae_model_name_or_path: ")
    named = ModelSource(str(file), config_from=str(folder), vae=str(folder / "vae"))
    assert check_model(named)[0].latent_channels == 4
    assert parameters(named).keys() == parameters(ModelSource(str(folder))).keys()


VAE = "first_stage_model."


@pytest.fixture(scope="module", params=["", VAE, "a whole model"])
def vae_and_file(request, models, tmp_path_factory):
    """A VAE's folder, and its weights in one file, under names with a prefix, or without, or among others."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(7)
    vae = make_vae(scaling_factor=0.13025)
    vae.save_pretrained(folder / "vae")
    state, others = vae_state(vae), {}
    if request.param == "a whole model":
        others = load_file(models["XL"][1])
    elif request.param == "":
        state = {name.removeprefix(VAE): tensor for name, tensor in state.items()}
    save_file(others | {name: tensor.contiguous() for name, tensor in state.items()}, folder / "vae.safetensors")
    return folder / "vae", folder / "vae.safetensors"


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
def test_a_vae_in_a_file_of_its_own(single, vae_and_file, models):
    """For models in a folder or a file; with what the model's own configuration says of it."""
    vae, file = vae_and_file
    folder, whole = models["XL"]
    model = ModelSource(str(whole), config_from=str(folder)) if single else ModelSource(str(folder))
    source, expected = (replace(model, vae=str(path)) for path in (file, vae))
    assert check_model(source)[0] == check_model(expected)[0]
    of_file, of_folder = (load_vae(s, torch.float32, CPU).state_dict() for s in (source, expected))
    assert of_file.keys() == of_folder.keys() and all(torch.equal(of_file[name], of_folder[name]) for name in of_file)
    assert not torch.equal(
        of_file["encoder.conv_in.weight"], load_vae(model, torch.float32, CPU).encoder.conv_in.weight
    )


def test_the_tools_draw_with_the_vae_in_its_file(vae_and_file, models, capsys):
    vae, file = vae_and_file
    config = {"base_model": str(models["XL"][0]), "settings": {"pretrained_vae_model_name_or_path": str(file)}}
    pipe = load_pipeline(base_of(config, None, None, None), torch.float32)
    assert torch.equal(pipe.vae.encoder.conv_in.weight, AutoencoderKL.from_pretrained(vae).encoder.conv_in.weight)
    assert "not there" not in capsys.readouterr().err


def test_a_vae_in_a_file_of_another_shape(models, tmp_path):
    state = {name: tensor.contiguous() for name, tensor in vae_state(make_vae()).items()}
    name = f"{VAE}encoder.conv_out.weight"
    for changed in (state | {name: state[name].repeat(2, 1, 1, 1)}, {n: t for n, t in state.items() if n != name}):
        save_file(changed, tmp_path / "vae.safetensors")
        (line,) = problems_of(models["1.x"][0], vae=str(tmp_path / "vae.safetensors"))
        assert line.startswith("--pretrained_vae_model_name_or_path: ")
        assert "is a VAE of another shape than the model's own (" in line and "encoder.conv_out.weight" in line


def test_a_second_generation_file_must_say_what_it_predicts(models, tmp_path, monkeypatch):
    folder, _ = models["2.x"]
    monkeypatch.setattr(
        "custom_diffusion.model.source.repository", lambda file: str(folder)
    )  # as if it were on the Hub
    (line,) = problems_of(models["2.x"][1])
    assert line.startswith("--prediction_type: ")
    said = ModelSource(str(models["2.x"][1]), prediction_type="epsilon")
    assert check_model(said)[1].config.prediction_type == "epsilon"
    marked = save_single_file(
        folder, tmp_path / "x.safetensors", open_clip=True, metadata={"modelspec.prediction_type": "v"}
    )
    assert check_model(ModelSource(str(marked)))[1].config.prediction_type == "v_prediction"


def test_what_a_file_says_of_its_schedule_counts(models, tmp_path):
    folder, file = models["1.x"]
    save_file(load_file(file) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "x.safetensors")
    source = ModelSource(str(tmp_path / "x.safetensors"), config_from=str(folder))
    config = check_model(source)[1].config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert load_pipeline(source, torch.float32).scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "prefix",
    [
        "cond_stage_model.transformer.text_model.encoder.layers.1.",
        f"{UNET}middle_block.0.",
        "first_stage_model.encoder.mid.",
    ],
)
def test_missing_weights_are_never_random(prefix, models, tmp_path):
    folder, _ = models["1.x"]
    file = save_single_file(folder, tmp_path / "x.safetensors", without=(prefix,))
    if not prefix.startswith("cond_stage_model."):  # those of UNet and VAE are missed before anything is loaded
        (line,) = problems_of(file, config_from=str(folder))
        assert "describes another model than" in line and "are missing, " in line
    with pytest.raises(InputError, match=r"weights of its .* are missing, "):
        load_models(ModelSource(str(file), config_from=str(folder)), torch.float32, CPU)


# Trained on


FEW_STEPS = {
    "max_train_steps": 2,
    "checkpointing_steps": 2,
    "train_batch_size": 1,
    "report_to": "none",
    "dataloader_num_workers": 0,
}


@pytest.fixture(scope="module")
def trained_on(run_arguments, tmp_path_factory):
    """Name of a demo's model -> it, its copy in one file, and what was trained on each."""
    made, folder = {}, tmp_path_factory.mktemp("trained")

    def train(name):
        if name not in made:
            model, place = launch.ROOT / "demo" / name, folder / name
            place.mkdir()
            file = save_single_file(model, place / "demo.safetensors", torch.float16)  # the demo's precision
            before = file.read_bytes()
            arguments = (
                run_arguments | FEW_STEPS | {"pretrained_model_name_or_path": model, "output_dir": place / "apart"}
            )
            of_file = {"pretrained_model_name_or_path": file, "config_from": model, "output_dir": place / "single"}
            launch.run(launch.FORKED, arguments, place / "apart.log").ok()
            launch.run(launch.FORKED, arguments | of_file, place / "single.log").ok()
            assert file.read_bytes() == before
            made[name] = model, file, place / "apart", place / "single"
        return made[name]

    return train


@pytest.fixture
def trained(trained_on):
    return trained_on("model")


@pytest.mark.parametrize("name", ["model", "model_sdxl"])
def test_a_file_trains_to_the_same_bits_as_its_folder(name, trained_on, trained_difference):
    model, file, apart, single = trained_on(name)
    assert trained_difference(apart, single) == 0
    config = read_weights(single).config
    assert config["base_model"] == str(file) and config["config_from"] == str(model)
    assert config["base_file"] == read_header(file).identity()
    assert read_weights(apart).config["base_file"] is None


def contents(path):
    """Tensors by name, an image's pixels, or nothing of files in which places and versions stand."""
    if path.suffix == ".png":
        return {"": torch.from_numpy(np.array(Image.open(path)))}
    return load_file(path) if path.suffix == ".safetensors" else {}


@pytest.mark.parametrize("name", ["model", "model_sdxl"])
@pytest.mark.parametrize("tool", ["generate", "merge", "compress", "export lora", "export pipeline"])
def test_every_tool_knows_the_file(tool, name, trained_on, tmp_path):
    """What the folder's weights give with their folder, the file's give with the file that they name."""
    _, _, apart, single = trained_on(name)
    made = []
    for weights in (apart, single):
        output = tmp_path / weights.name
        if tool == "generate":
            generate(weights, "<new1> cat", output=output / "x.png", num_inference_steps=1, height=64, width=64)
        elif tool == "merge":
            merge([weights, weights], output=output, max_captions=20)
        elif tool == "compress":
            compress(weights, output=output)
        else:
            export(weights, to=tool.split()[1], output=output)
        made.append(
            {path.relative_to(output): contents(path) for path in sorted(output.rglob("*.*")) if path.is_file()}
        )
    assert made[0].keys() == made[1].keys()
    for name, tensors in made[0].items():
        assert tensors.keys() == made[1][name].keys(), name
        assert all(torch.equal(tensor, made[1][name][key]) for key, tensor in tensors.items()), name


@pytest.mark.parametrize("name", ["model", "model_sdxl"])
def test_a_checkpoint_and_a_file_that_is_named_draw_the_same(name, trained_on, tmp_path):
    model, file, apart, single = trained_on(name)
    flags = ("--prompt", "a <new1> circle", "--num_inference_steps", 1)
    asked = {
        "final": ("--weights", single),
        "checkpoint": ("--weights", single / "checkpoint-2"),  # the last step
        "named": ("--weights", apart, "--model", file, "--config_from", model),
        "base": ("--model", file, "--config_from", model),
    }
    images = []
    for kind, given in asked.items():
        prompt = flags if kind != "base" else ("--prompt", "a circle", *flags[2:])
        run_tool("generate", *given, *prompt, "--output", tmp_path / f"{kind}.png")
        images.append(np.array(Image.open(tmp_path / f"{kind}.png")))
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[3])


@pytest.mark.parametrize("tool", ["merge", "compress"])
def test_what_a_tool_makes_names_the_file(tool, trained, tmp_path):
    _, _, _, single = trained
    if tool == "merge":
        merge([single, single], output=tmp_path / "made", max_captions=20)
    else:
        compress(single, output=tmp_path / "made")
    named = {
        name: read_weights(tmp_path / "made").config[name]
        for name in ("base_model", "config_from", "base_file", "inpainting")
    }
    assert named == {name: read_weights(single).config[name] for name in named}


@pytest.fixture
def replaced(trained, tmp_path):
    """Weights whose base is another file now, and where the one that they were trained on is."""
    model, file, _, single = trained
    other = tmp_path / "here.safetensors"
    save_single_file(model, other, torch.float32)
    shutil.copytree(single, tmp_path / "cat")
    settings = tmp_path / "cat" / CONFIG_NAME
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model": str(other)}))
    return tmp_path / "cat", other, file


def test_a_wrong_base_is_noticed(replaced, capsys):
    weights, other, file = replaced
    config = read_weights(weights).config
    with pytest.raises(InputError) as error:
        base_of(config, None, None, None)
    assert f"--model: '{other}' is not the file that the weights were trained on, 'demo.safetensors' of " in str(
        error.value
    )
    assert base_of(config, str(file), None, None).path == str(file) and not capsys.readouterr().err
    assert base_of(config, str(other), None, None).path == str(other)
    assert "is not the file that the weights were trained on" in capsys.readouterr().err


def test_a_file_that_moved_is_asked_for(trained, tmp_path):
    config = read_weights(trained[3]).config | {"base_model": str(tmp_path / "gone.safetensors")}
    with pytest.raises(InputError, match="which is not there; say where the model is now"):
        base_of(config, None, None, None)


def test_the_configuration_is_the_recorded_one_unless_it_is_gone(trained, tmp_path, capsys):
    model, file, _, single = trained
    config = read_weights(single).config
    assert base_of(config, None, None, None).config_from == str(model)
    assert base_of(config, str(file), None, None).config_from == str(model)
    assert base_of(config, None, None, None, "another/one").config_from == "another/one"
    assert base_of(config | {"config_from": str(tmp_path / "gone")}, None, None, None).config_from is None
    assert "which is not there" in capsys.readouterr().err


def test_a_run_is_not_resumed_on_another_file(trained, run_arguments, tmp_path):
    model, _, _, single = trained
    shutil.copytree(single, tmp_path / "out")
    other = save_single_file(model, tmp_path / "other.safetensors", torch.float32)
    arguments = run_arguments | FEW_STEPS | {"output_dir": tmp_path / "out", "config_from": model}
    again = {"pretrained_model_name_or_path": other, "resume_from_checkpoint": "latest", "max_train_steps": 3}
    refused = launch.run(launch.FORKED, arguments | again, tmp_path / "log")
    assert refused.status == 2
    assert "its model was another file ('demo.safetensors', " in refused.messages[0]


def test_the_configuration_comes_from_the_familys_repository(models, run_arguments, tmp_path):
    """A few small files of it, and no weights."""
    folder, file = models["1.x"]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments = run_arguments | FEW_STEPS | {"pretrained_model_name_or_path": file, "output_dir": tmp_path / "out"}
    drawn = {
        "validation_prompt": "a <new1> cat",
        "num_validation_images": 1,
        "real_prior": False,
        "num_class_images": 1,
    }
    with HubServer() as hub:
        hub.repositories["stable-diffusion-v1-5/stable-diffusion-v1-5"] = files
        environment = hub.environment(tmp_path / "cache", token=None) | {"HF_HUB_OFFLINE": "0"}
        arguments |= drawn | {"max_train_steps": 1, "class_data_dir": tmp_path / "class"}
        launch.run(launch.PLAIN, arguments, tmp_path / "log", environment).ok()
        got = {path.partition("/resolve/")[2].partition("/")[2] for method, path in hub.requests if method == "GET"}
    assert "unet/config.json" in got and "tokenizer/vocab.json" in got
    assert not any(path.endswith((".safetensors", ".bin")) for path in got), got
    config = read_weights(tmp_path / "out").config
    assert config["config_from"] is None and config["base_file"] == read_header(file).identity()
    assert (tmp_path / "out" / "samples" / "final-0.png").is_file()


def test_what_is_handed_on_names_no_place(trained):
    _, _, _, single = trained
    public = public_config(read_weights(single).config)
    assert public["base_model"] is public["config_from"] is public["settings"]["config_from"] is None
    assert public["base_file"]["name"] == "demo.safetensors"
    card = str(model_card("me/cat", public, []))
    assert "pipe = StableDiffusionPipeline.from_single_file('demo.safetensors', torch_dtype=torch.float16)" in card
    assert f"SHA-256 of its header {public['base_file']['header_sha256']}" in card and str(launch.ROOT) not in card
