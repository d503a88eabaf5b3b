"""Base models in one file: what such a file is, told from its header, and that it teaches the same as its folder."""

import json

import launch
import pytest
import torch
from original_layout import save_single_file
from safetensors.torch import save_file

from custom_diffusion.families import SUPPORTED
from custom_diffusion.single_file import model_in, read_header
from custom_diffusion.weights.format import read_weights

UNET = "model.diffusion_model."


def file_problem(path):
    try:
        model_in(path)
    except ValueError as error:
        return str(error)


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


# Trained on


FEW_STEPS = {"max_train_steps": 3, "report_to": "none", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def trained(run_arguments, tiny_xl_model, tmp_path_factory):
    """family -> (folder, its copy in one file, trained on the folder, trained on the file)."""
    made = {}

    def train(family):
        if family not in made:
            model = {"sd": launch.ROOT / "demo" / "model", "sdxl": tiny_xl_model}[family]
            folder = tmp_path_factory.mktemp(family)
            file = save_single_file(model, folder / "one.safetensors")
            arguments = (
                run_arguments | FEW_STEPS | {"pretrained_model_name_or_path": model, "output_dir": folder / "apart"}
            )
            of_file = {"pretrained_model_name_or_path": file, "config_from": model, "output_dir": folder / "single"}
            launch.run(launch.FORKED, arguments, folder / "apart.log").ok()
            launch.run(launch.FORKED, arguments | of_file, folder / "single.log").ok()
            made[family] = model, file, folder / "apart", folder / "single"
        return made[family]

    return train


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_file_trains_to_the_same_bits_as_its_folder(family, trained, trained_difference):
    model, file, apart, single = trained(family)
    assert trained_difference(apart, single) == 0
    config = read_weights(single).config
    assert config["base_model"] == str(file) and config["config_from"] == str(model)
    assert config["base_file"] == read_header(file).identity()
    assert read_weights(apart).config["base_file"] is None
