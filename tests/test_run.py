"""The guide's commands, shrunk to 64 pixels and a tiny model, through `accelerate launch`; and what they leave behind."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from launch import ACCELERATE, FORKED, SCRIPT, flags, run
from PIL import Image
from test_weights import draw, make_pipeline
from tiny import make_class_folder, make_pictures

from custom_diffusion import generate, load_custom_diffusion
from custom_diffusion.cli.training_flags import build_parser
from custom_diffusion.files import WEIGHTS_NAME
from custom_diffusion.model.source import check_model
from custom_diffusion.weights.format import read_weights
from train_custom_diffusion import make_plan, make_source

COMMON = {
    "resolution": 64,
    "max_train_steps": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 0,
    "scale_lr": True,
    "hflip": True,
}


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "logs/" not in str(path)}


def samples(name, count=2):
    return {f"samples/{name}-{index}.png" for index in range(count)}


def weight_files(*tokens, formats=("safetensors", "bin")):
    names = [WEIGHTS_NAME, *tokens]
    return {f"{name}.{suffix}" for name in names for suffix in formats} | {"custom_diffusion_config.json"}


def result_files(*tokens, **formats):
    return weight_files(*tokens, **formats) | {"curve.png", "curve.json"}


def checkpoint_files(step, *tokens, suffix="safetensors"):
    names = weight_files(*tokens, formats=(suffix,)) | {"training_state.pt", "checkpoint.json"}
    return {f"checkpoint-{step}/{name}" for name in names}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """data/cat, data/wooden_pot, real_reg/..., as the guide lays them out."""
    root = tmp_path_factory.mktemp("guide")
    make_pictures(root / "data/cat", 5)
    (root / "data/cat/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (root / "data/cat/notes.txt").write_text("no picture")
    make_pictures(root / "data/wooden_pot", 4, seed=5, suffix=".png")
    make_class_folder(root / "real_reg/samples_cat", 6)
    make_class_folder(root / "real_reg/samples_wooden_pot", 6, caption="a wooden pot {}", seed=7)
    return root


@pytest.fixture(scope="module")
def cat(tiny_model, pictures, tmp_path_factory):
    """The guide's single-concept command."""
    out = tmp_path_factory.mktemp("runs") / "cat"
    arguments = COMMON | {
        "pretrained_model_name_or_path": tiny_model, "instance_data_dir": pictures / "data/cat", "output_dir": out,
        "class_data_dir": pictures / "real_reg/samples_cat/", "with_prior_preservation": True, "real_prior": True,
        "prior_loss_weight": 1.0, "class_prompt": "cat", "num_class_images": 6,
        "instance_prompt": "photo of a <new1> cat", "train_batch_size": 2, "modifier_token": "<new1>",
        "validation_prompt": "<new1> cat sitting in a bucket", "validation_steps": 2, "checkpointing_steps": 3,
    }  # fmt: skip
    run(ACCELERATE, arguments, out.with_suffix(".log")).ok()
    return out


def test_cat_files(cat):
    shown = samples("step-000000") | samples("step-000002") | samples("final")
    assert files_of(cat) == result_files("<new1>") | checkpoint_files(3, "<new1>") | shown
    config = json.loads((cat / "custom_diffusion_config.json").read_text())
    assert config["modifier_tokens"] == ["<new1>"]
    assert config["concepts"][0]["instance_prompt"] == "photo of a <new1> cat"
    assert config["concepts"][0]["num_photos"] == 5


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("folder", [".", "checkpoint-3"])
def test_cat_draws_the_same_with_every_loader(cat, tiny_model, folder, suffix):
    if folder != "." and suffix == "bin":
        pytest.skip("checkpoints hold one format")
    ours, theirs = make_pipeline(tiny_model), make_pipeline(tiny_model)
    prompt = "<new1> cat sitting in a bucket"
    base = draw(ours, prompt)
    load_custom_diffusion(ours, cat / folder)
    theirs.unet.load_attn_procs(cat / folder, weight_name=f"{WEIGHTS_NAME}.{suffix}", _pipeline=theirs)
    theirs.load_textual_inversion(cat / folder, weight_name=f"<new1>.{suffix}")
    drawn = draw(ours, prompt)
    assert np.abs(drawn - draw(theirs, prompt)).max() < 1
    assert np.abs(drawn - base).max() > 1


def test_validation_pictures_change_and_have_the_size(cat):
    first, last = (Image.open(cat / f"samples/{name}-0.png") for name in ("step-000000", "final"))
    assert first.size == (64, 64)
    assert not np.array_equal(np.asarray(first), np.asarray(last))
    other = Image.open(cat / "samples/final-1.png")
    assert not np.array_equal(np.asarray(last), np.asarray(other))


def test_final_pictures_are_what_the_folder_draws(cat, tiny_model):
    """The pictures shown at the end come from the files, by the public loader."""
    pipeline = make_pipeline(tiny_model)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    load_custom_diffusion(pipeline, cat)
    image = pipeline(
        "<new1> cat sitting in a bucket", num_inference_steps=25, height=64, width=64,
        generator=torch.Generator().manual_seed(42),
    ).images[0]  # fmt: skip
    saved = np.asarray(Image.open(cat / "samples/final-0.png")).astype(int)
    assert np.abs(np.asarray(image).astype(int) - saved).max() <= 1


def test_cat_and_wooden_pot(tmp_path, tiny_v_model, pictures):
    """The guide's command for two concepts, on a v-prediction model, .bin files only."""
    concepts = [
        {
            "instance_prompt": f"photo of a {token} {name}", "class_prompt": name,
            "instance_data_dir": str(pictures / "data" / folder),
            "class_data_dir": str(pictures / "real_reg" / f"samples_{folder}"),
        }
        for token, name, folder in (("<new1>", "cat", "cat"), ("<new2>", "wooden pot", "wooden_pot"))
    ]  # fmt: skip
    (tmp_path / "concept_list.json").write_text(json.dumps(concepts))
    out = tmp_path / "out"
    arguments = COMMON | {
        "pretrained_model_name_or_path": tiny_v_model, "output_dir": out, "with_prior_preservation": True,
        "concepts_list": "concept_list.json", "real_prior": True, "prior_loss_weight": 1.0, "train_batch_size": 2,
        "num_class_images": 6, "modifier_token": "<new1>+<new2>", "no_safe_serialization": True,
        "checkpointing_steps": 4,
    }  # fmt: skip
    run(ACCELERATE, arguments, tmp_path / "run.log").ok()
    tokens = ("<new1>", "<new2>")
    assert files_of(out) == result_files(*tokens, formats=("bin",)) | checkpoint_files(4, *tokens, suffix="bin")
    ours, theirs = make_pipeline(tiny_v_model), make_pipeline(tiny_v_model)
    prompt = "the <new2> pot and the <new1> cat"
    base = draw(ours, prompt)
    load_custom_diffusion(ours, out)
    theirs.unet.load_attn_procs(out, weight_name=f"{WEIGHTS_NAME}.bin", _pipeline=theirs)
    for token in tokens:
        theirs.load_textual_inversion(out, weight_name=f"{token}.bin")
    drawn = draw(ours, prompt)
    assert np.abs(drawn - draw(theirs, prompt)).max() < 1
    assert np.abs(drawn - base).max() > 1


def test_person(tmp_path, tiny_model, pictures):
    """The guide's command for faces, with generated class images, accumulation and gradient checkpointing."""
    out = tmp_path / "out"
    arguments = COMMON | {
        "pretrained_model_name_or_path": tiny_model, "instance_data_dir": pictures / "data/cat", "output_dir": out,
        "class_data_dir": tmp_path / "generated", "with_prior_preservation": True, "class_prompt": "person",
        "num_class_images": 3, "instance_prompt": "photo of a <new1> person", "train_batch_size": 1, "noaug": True,
        "freeze_model": "crossattn", "modifier_token": "<new1>", "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True, "learning_rate": 5e-4, "sample_batch_size": 2,
    }  # fmt: skip
    run(ACCELERATE, arguments, tmp_path / "run.log").ok()
    assert files_of(out) == result_files("<new1>")
    assert len(list((tmp_path / "generated").glob("*.jpg"))) == 3
    pipeline = make_pipeline(tiny_model)
    base = draw(pipeline, "photo of a <new1> person")
    load_custom_diffusion(pipeline, out)
    assert np.abs(draw(pipeline, "photo of a <new1> person") - base).max() > 1


def test_two_concepts_with_two_text_encoders(tmp_path, tiny_xl_model, pictures):
    """SDXL, with generated class images, captions of their own for the other concept's, and every prompt another."""
    concepts = [
        {"instance_prompt": f"photo of a {token} {name}", "class_prompt": name,
         "instance_data_dir": str(pictures / "data" / folder), "class_data_dir": str(tmp_path / folder)}
        for token, name, folder in (("<new1>", "cat", "cat"), ("<new2>", "pot", "wooden_pot"))
    ]  # fmt: skip
    (tmp_path / "concept_list.json").write_text(json.dumps(concepts))
    out = tmp_path / "out"
    arguments = COMMON | {
        "pretrained_model_name_or_path": tiny_xl_model, "output_dir": out, "with_prior_preservation": True,
        "concepts_list": "concept_list.json", "train_batch_size": 2, "num_class_images": 2, "sample_batch_size": 2,
        "modifier_token": "<new1>+<new2>", "checkpointing_steps": 4, "gradient_checkpointing": True,
        "validation_prompt": "<new1> cat in a <new2> pot", "num_validation_images": 1, "mixed_precision": "bf16",
    }  # fmt: skip
    run(FORKED, arguments, tmp_path / "run.log").ok()
    tokens = ("<new1>", "<new2>")
    shown = samples("step-000000", 1) | samples("final", 1)
    assert files_of(out) == result_files(*tokens) | checkpoint_files(4, *tokens) | shown
    weights, again = read_weights(out), read_weights(out / "checkpoint-4")
    assert weights.token_widths == (32, 40) and weights.config["family"] == "Stable Diffusion XL"
    assert all(torch.equal(row, again.tokens[token]) for token, row in weights.tokens.items())
    pipeline = make_pipeline(tiny_xl_model)
    rows = pipeline.text_encoder.get_input_embeddings().weight[
        pipeline.tokenizer.convert_tokens_to_ids(["ktn</w>", "pll</w>"])
    ]
    for token, start in zip(tokens, rows):  # of the last word too, and each has learned from its own
        assert 0 < (weights.tokens[token][:32] - start).abs().max() < 0.1
    base = draw(pipeline, "a cat in a pot")
    load_custom_diffusion(pipeline, out)
    assert np.abs(draw(pipeline, "a cat in a pot") - base).max() > 1


def test_the_resolution_is_the_familys_unless_it_is_given(tiny_model, tiny_xl_model):
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="no")
    for model, given, size in ((tiny_model, None, 512), (tiny_xl_model, None, 1024), (tiny_xl_model, 64, 64)):
        args = build_parser().parse_args(flags(pretrained_model_name_or_path=model, resolution=given))
        shape, _ = check_model(make_source(args))
        plan = make_plan(args, shape, accelerator)
        assert (plan.size, plan.latent_shape) == (size, (4, size // 4, size // 4))
        assert args.resolution == given


def test_without_modifier_token_and_prior(tmp_path, tiny_model, pictures):
    out = tmp_path / "out"
    arguments = COMMON | {
        "pretrained_model_name_or_path": tiny_model, "instance_data_dir": pictures / "data/wooden_pot",
        "instance_prompt": "photo of a wooden pot", "output_dir": out, "num_train_epochs": 2, "train_batch_size": 2,
    }  # fmt: skip
    arguments.pop("max_train_steps")
    output = run(FORKED, arguments, tmp_path / "run.log").ok()
    assert "for 4 optimizer steps" in output  # 2 epochs of 4 photos by 2
    assert files_of(out) == result_files()
    pipeline = make_pipeline(tiny_model)
    base = draw(pipeline, "a wooden pot")
    load_custom_diffusion(pipeline, out)
    assert np.abs(draw(pipeline, "a wooden pot") - base).max() > 0.5


def test_cached_latents_give_the_same_run_for_any_workers(tmp_path, tiny_model, pictures):
    arguments = COMMON | {
        "pretrained_model_name_or_path": tiny_model, "instance_data_dir": pictures / "data/cat",
        "class_data_dir": pictures / "real_reg/samples_cat/", "with_prior_preservation": True, "real_prior": True,
        "class_prompt": "cat", "num_class_images": 6, "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>", "cache_latents": True, "augmentations_per_image": 2, "max_train_steps": 6,
    }  # fmt: skip
    written = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        run(
            FORKED, arguments | {"output_dir": out, "dataloader_num_workers": workers}, tmp_path / f"{workers}.log"
        ).ok()
        written.append((out / f"{WEIGHTS_NAME}.safetensors").read_bytes())
    assert written[0] == written[1]


SCALED = """
import runpy, sys, torch, accelerate
make = accelerate.Accelerator.__init__
def with_scaler(self, *args, **kwargs):
    make(self, *args, **kwargs)
    self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)  # accelerate gives one to GPUs only
accelerate.Accelerator.__init__ = with_scaler
sys.argv[0] = {script!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def test_fp16_with_gradient_scaling(tmp_path, tiny_model, pictures):
    """Steps whose scaled gradients overflow are skipped, the scale falls, and the run goes on; resuming keeps the scale."""
    script = tmp_path / "scaled.py"
    script.write_text(SCALED.format(script=SCRIPT))
    arguments = COMMON | {
        "pretrained_model_name_or_path": tiny_model,
        "instance_data_dir": pictures / "data/cat",
        "instance_prompt": "photo of a <new1> cat",
        "modifier_token": "<new1>",
        "train_batch_size": 1,
        "output_dir": tmp_path / "out",
        "mixed_precision": "fp16",
        "freeze_model": "crossattn",
        "checkpointing_steps": 6,
        "max_train_steps": 6,
        "resume_from_checkpoint": "latest",
    }
    scales = []
    for steps in (6, 12):
        run((sys.executable, str(script)), arguments | {"max_train_steps": steps}, tmp_path / "run.log").ok()
        state = torch.load(tmp_path / f"out/checkpoint-{steps}/training_state.pt", weights_only=True)
        scales.append(state["scaler"]["scale"])
    assert scales[0] < 2.0**22
    assert scales[1] <= scales[0]
    assert all(tensor.isfinite().all() for tensor in read_weights(tmp_path / "out").tensors.values())


def test_a_relative_base_model_is_found_from_anywhere(run_arguments, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").symlink_to(tiny_model)
    arguments = run_arguments | {"pretrained_model_name_or_path": "model", "output_dir": "out", "max_train_steps": 1}
    run(FORKED, arguments, tmp_path / "here" / "log").ok()  # runs in the folder of its log
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    generate("../here/out", "a <new1> cat", output="cat.png", num_inference_steps=1)
    assert (tmp_path / "there" / "cat.png").is_file()
