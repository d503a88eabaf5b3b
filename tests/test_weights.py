"""The trained folder in real pipelines: ours and diffusers' loader, half precision, offloading, LoRA, undoing."""

import copy
import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from launch import ROOT
from peft import LoraConfig
from tiny import make_model

from custom_diffusion import load_custom_diffusion, unload_custom_diffusion
from custom_diffusion.files import WEIGHTS_NAME
from custom_diffusion.model.attention import TRAINED_PROJECTIONS
from custom_diffusion.weights.format import (
    ConceptWeights,
    cross_attention_names,
    read_weights,
    save_state,
    save_tensors,
    write_weights,
)

PROMPT = "photo of a <new1> cat"


def make_concept(folder, model, freeze_model="crossattn_kv", tokens=("<new1>",), seed=0):
    """A folder as training writes it, with weights a little off the model's."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: p.detach() + 0.2 * p.std() * torch.randn(p.shape, generator=generator)
        for name, p in unet.named_parameters()
        if any(f"attn2.{projection}." in name for projection in TRAINED_PROJECTIONS[freeze_model])
    }
    embeddings = {token: 20 * torch.randn(32, generator=generator) for token in tokens}
    config = {"base_model": str(model), "modifier_tokens": list(tokens)}
    write_weights(folder, ConceptWeights(tensors, embeddings, config), unet, ("safetensors", "bin"))
    return folder


def make_pipeline(model, dtype=torch.float32):
    pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompt=PROMPT):
    """(64, 64, 3) float in [0, 255]."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": 6.0, "height": 64, "width": 64, "output_type": "np"}
    return 255 * pipeline(prompt, generator=generator, **options).images[0]


def state_of(pipeline):
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {f"{part}.{n}": t.clone() for part, module in parts.items() for n, t in module.state_dict().items()}


def assert_same_state(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def concept(tmp_path_factory, tiny_model):
    return make_concept(tmp_path_factory.mktemp("concept") / "kv", tiny_model)


@pytest.fixture(scope="module")
def full_concept(tmp_path_factory, tiny_model):
    """All of the cross-attention, two tokens."""
    folder = tmp_path_factory.mktemp("concept") / "full"
    return make_concept(folder, tiny_model, "crossattn", ("<new1>", "<new2>"), seed=1)


def test_files_are_small_and_have_the_format(concept):
    state = torch.load(concept / f"{WEIGHTS_NAME}.bin", weights_only=True)
    safe = safetensors.torch.load_file(concept / f"{WEIGHTS_NAME}.safetensors")
    assert state.keys() == safe.keys()
    with safetensors.safe_open(concept / f"{WEIGHTS_NAME}.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it some loaders refuse the file
    assert sum(len(value) == 0 for value in state.values()) == 4  # one for each self-attention
    for key, value in state.items():
        if key.endswith("attn1.processor"):
            assert value == {}
            assert len(safe[key]) == 0
        else:
            assert key.endswith(
                ("attn2.processor.to_k_custom_diffusion.weight", "attn2.processor.to_v_custom_diffusion.weight")
            )
            assert torch.equal(value, safe[key])
            assert value.dtype == torch.float32
    for suffix in ("bin", "safetensors"):
        assert (concept / f"<new1>.{suffix}").stat().st_size < 4096


@pytest.mark.parametrize("fixture", ["concept", "full_concept"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_ours_and_diffusers_loader_draw_the_same(request, tiny_model, fixture, suffix):
    folder = request.getfixturevalue(fixture)
    tokens = read_weights(folder).tokens
    prompt = PROMPT + " " + " ".join(tokens)
    ours = make_pipeline(tiny_model)
    base = draw(ours, prompt)
    load_custom_diffusion(ours, folder)
    theirs = make_pipeline(tiny_model)
    theirs.unet.load_attn_procs(folder, weight_name=f"{WEIGHTS_NAME}.{suffix}", _pipeline=theirs)
    for token in tokens:
        theirs.load_textual_inversion(folder, weight_name=f"{token}.{suffix}")
    drawn = draw(ours, prompt)
    assert np.abs(drawn - draw(theirs, prompt)).max() < 1
    assert np.abs(drawn - base).max() > 5


def test_stock_attention_stays(tiny_model, concept):
    pipeline = make_pipeline(tiny_model)
    before = {name: type(processor) for name, processor in pipeline.unet.attn_processors.items()}
    load_custom_diffusion(pipeline, concept)
    assert {name: type(processor) for name, processor in pipeline.unet.attn_processors.items()} == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unloading_restores_every_bit(tiny_model, full_concept, dtype):
    pipeline = make_pipeline(tiny_model, dtype)
    before, vocabulary = state_of(pipeline), pipeline.tokenizer.get_vocab()
    load_custom_diffusion(pipeline, full_concept)
    loaded = state_of(pipeline)
    weights = read_weights(full_concept)
    for name, tensor in weights.tensors.items():
        assert torch.equal(loaded[f"unet.{name}"], tensor.to(dtype))
    rows = pipeline.text_encoder.get_input_embeddings().weight
    for token, embedding in weights.tokens.items():
        assert torch.equal(rows[pipeline.tokenizer.convert_tokens_to_ids(token)], embedding.to(dtype))
    unload_custom_diffusion(pipeline)
    assert_same_state(state_of(pipeline), before)
    assert pipeline.tokenizer.get_vocab() == vocabulary
    unload_custom_diffusion(pipeline)  # nothing is loaded: nothing happens
    assert_same_state(state_of(pipeline), before)


def test_loading_again_and_loading_another_replaces(tiny_model, concept, full_concept):
    pipeline = make_pipeline(tiny_model)
    before = state_of(pipeline)
    load_custom_diffusion(pipeline, concept)
    once = state_of(pipeline)
    load_custom_diffusion(pipeline, concept)
    assert_same_state(state_of(pipeline), once)
    load_custom_diffusion(pipeline, full_concept)
    another = make_pipeline(tiny_model)
    load_custom_diffusion(another, full_concept)
    assert_same_state(state_of(pipeline), state_of(another))
    unload_custom_diffusion(pipeline)
    assert_same_state(state_of(pipeline), before)


def hooks_of(pipeline):
    modules = {"unet": pipeline.unet, "conv": pipeline.unet.conv_in, "text_encoder": pipeline.text_encoder}
    hooks = {name: getattr(module, "_hf_hook", None) for name, module in modules.items()}
    devices = {name: str(getattr(hook, "execution_device", None)) for name, hook in hooks.items()}
    return {name: (type(hook), devices[name]) for name, hook in hooks.items()}


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_pipelines(tiny_model, concept, offload):
    plain, pipeline = make_pipeline(tiny_model), make_pipeline(tiny_model)
    getattr(pipeline, offload)(device="cpu")
    hooks_before = hooks_of(pipeline)
    load_custom_diffusion(pipeline, concept)
    load_custom_diffusion(plain, concept)
    assert hasattr(pipeline.unet, "_hf_hook") or hasattr(pipeline.unet.conv_in, "_hf_hook")
    assert hooks_of(pipeline) == hooks_before
    wrong = ConceptWeights(read_weights(concept).tensors, {"<new1>": torch.zeros(7)})
    with pytest.raises(ValueError, match="the concept does not fit the pipeline: the embedding of <new1>"):
        load_custom_diffusion(pipeline, wrong)
    assert hooks_of(pipeline) == hooks_before
    pipeline.remove_all_hooks()
    assert_same_state(state_of(pipeline), state_of(plain))


def test_under_a_lora(tiny_model, concept):
    pipeline = make_pipeline(tiny_model)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=True))
    load_custom_diffusion(pipeline, concept)
    plain = make_pipeline(tiny_model)
    load_custom_diffusion(plain, concept)
    assert np.abs(draw(pipeline) - draw(plain)).max() < 1
    unload_custom_diffusion(pipeline)
    base = make_pipeline(tiny_model)
    name = cross_attention_names(base.unet)[0]
    assert torch.equal(
        pipeline.unet.get_submodule(f"{name}.to_k").base_layer.weight, base.unet.get_submodule(f"{name}.to_k").weight
    )


def test_folders_of_the_reference_script(tmp_path, tiny_model, concept):
    """They have no settings file, one format only, and .safetensors without an entry for self-attentions."""
    state = safetensors.torch.load_file(concept / f"{WEIGHTS_NAME}.safetensors")
    state = {key: value for key, value in state.items() if len(value)}
    safetensors.torch.save_file(state, tmp_path / f"{WEIGHTS_NAME}.safetensors")
    table = torch.randn(300, 32)
    table[7] = read_weights(concept).tokens["<new1>"]
    torch.save({"<new1>": table[7]}, tmp_path / "<new1>.bin")
    theirs, ours = make_pipeline(tiny_model), make_pipeline(tiny_model)
    load_custom_diffusion(theirs, tmp_path)
    load_custom_diffusion(ours, concept)
    assert_same_state(state_of(theirs), state_of(ours))


def spoil_another_model(folder, tmp_path):
    return make_concept(tmp_path / "other", make_model(tmp_path / "wide", width=48))


def spoil_truncated(folder, _):
    path = folder / f"{WEIGHTS_NAME}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def spoil_pickle(folder, _):
    (folder / f"{WEIGHTS_NAME}.safetensors").unlink()
    torch.save({"x": torch.nn.Linear(1, 1)}, folder / f"{WEIGHTS_NAME}.bin")  # needs arbitrary code to load
    return folder


def spoil_foreign_keys(folder, _):
    safetensors.torch.save_file({"lora.down": torch.zeros(2, 2)}, folder / f"{WEIGHTS_NAME}.safetensors")
    return folder


def spoil_token(folder, _):
    (folder / "<new1>.safetensors").unlink()
    (folder / "<new1>.bin").unlink()
    return folder


def spoil_token_shape(folder, _):
    safetensors.torch.save_file({"<new1>": torch.zeros(7)}, folder / "<new1>.safetensors")
    return folder


def spoil_missing_layer(folder, _):
    path = folder / f"{WEIGHTS_NAME}.safetensors"
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v for k, v in state.items() if "mid_block" not in k}, path)
    return folder


def spoil_settings(folder, _):
    (folder / "custom_diffusion_config.json").write_text("{")
    return folder


def spoil_everything(folder, _):
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_another_model, "to_k.weight"),
        (spoil_truncated, f"{WEIGHTS_NAME}.safetensors"),
        (spoil_pickle, f"{WEIGHTS_NAME}.bin"),
        (spoil_foreign_keys, "lora.down"),
        (spoil_token, "<new1>"),
        (spoil_token_shape, "<new1>"),
        (spoil_missing_layer, "cross-attentions"),
        (spoil_settings, "custom_diffusion_config.json"),
        (spoil_everything, WEIGHTS_NAME),
    ],
)
def test_what_cannot_be_loaded_is_named_and_changes_nothing(tmp_path, tiny_model, concept, full_concept, spoil, named):
    folder = spoil(shutil.copytree(concept, tmp_path / "copy"), tmp_path)
    pipeline = make_pipeline(tiny_model)
    load_custom_diffusion(pipeline, full_concept)
    before, vocabulary = state_of(pipeline), pipeline.tokenizer.get_vocab()
    with pytest.raises(ValueError, match=re.escape(named)) as error:
        load_custom_diffusion(pipeline, folder)
    assert "\n" not in str(error.value)
    assert_same_state(state_of(pipeline), before)
    assert pipeline.tokenizer.get_vocab() == vocabulary


def test_a_concept_without_tokens(tiny_model, concept):
    pipeline = make_pipeline(tiny_model)
    before, vocabulary = state_of(pipeline), pipeline.tokenizer.get_vocab()
    weights = ConceptWeights(read_weights(concept).tensors, {})
    load_custom_diffusion(pipeline, weights)
    for name, tensor in weights.tensors.items():
        assert torch.equal(pipeline.unet.get_parameter(name), tensor)
    assert pipeline.tokenizer.get_vocab() == vocabulary
    unload_custom_diffusion(pipeline)
    assert_same_state(state_of(pipeline), before)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer"])
def test_a_pipeline_without_a_part_is_named(tiny_model, concept, part):
    pipeline = make_pipeline(tiny_model)
    setattr(pipeline, part, None)
    with pytest.raises(ValueError, match=f"'{concept}' does not fit the pipeline: it has no {part}$"):
        load_custom_diffusion(pipeline, str(concept))


def test_a_pipeline_of_another_kind_is_refused(concept):
    unet = UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with pytest.raises(ValueError, match=r"does not fit the pipeline: it has no text_encoder$"):
        load_custom_diffusion(DDPMPipeline(unet, DDPMScheduler()), concept)


def test_a_token_that_another_has_brought_is_named(tiny_model, concept):
    pipeline = make_pipeline(tiny_model)
    pipeline.load_textual_inversion({"<new1>": torch.ones(32)}, token="<new1>")
    before = state_of(pipeline)
    with pytest.raises(ValueError, match=r"its tokenizer already has <new1>; unload"):
        load_custom_diffusion(pipeline, concept)
    assert_same_state(state_of(pipeline), before)


def test_tokens_of_any_name_and_settings_of_any_language(tmp_path, tiny_model):
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    tensors = read_weights(make_concept(tmp_path / "base", tiny_model)).tensors
    config = {"modifier_tokens": ["sks"], "prompt": "Kätzchen"}
    write_weights(tmp_path / "deep" / "new", ConceptWeights(tensors, {"sks": torch.ones(32)}, config), unet, ("bin",))
    weights = read_weights(str(tmp_path / "deep" / "new"))
    assert list(weights.tokens) == ["sks"] and weights.config == config
    assert {p.name for p in (tmp_path / "deep" / "new").iterdir()} == {
        f"{WEIGHTS_NAME}.bin", "sks.bin", "custom_diffusion_config.json"
    }  # fmt: skip


def test_tokens_of_folders_without_settings_are_found_by_their_files(tmp_path, concept):
    folder = shutil.copytree(concept, tmp_path / "copy")
    (folder / "custom_diffusion_config.json").unlink()
    torch.save({"<cat>": torch.ones(32)}, folder / "<cat>.bin")
    (folder / "<new1>.bin").unlink()
    (folder / "notes.bin").touch()
    weights = read_weights(folder)
    assert list(weights.tokens) == ["<cat>", "<new1>"] and weights.config == {}
    (folder / f"{WEIGHTS_NAME}.bin").write_bytes(b"never read")  # .safetensors comes first
    assert read_weights(folder).tensors.keys() == weights.tensors.keys()


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"<new1>": torch.zeros(32), "<new2>": torch.zeros(32)}, "it is not the embedding of '<new1>'"),
        ({"<new2>": torch.zeros(32)}, "it is not the embedding of '<new1>'"),
        ({"<new1>": torch.zeros(1, 32)}, "it is not the embedding of '<new1>'"),
        ({"<new1>": {}}, "it is not the embedding of '<new1>'"),
    ],
)
def test_files_that_hold_another_embedding_are_named(tmp_path, concept, state, named):
    folder = shutil.copytree(concept, tmp_path / "copy")
    (folder / "<new1>.safetensors").unlink()
    torch.save(state, folder / "<new1>.bin")
    with pytest.raises(ValueError, match=re.escape(f"'{folder / '<new1>.bin'}' cannot be used: {named}")):
        read_weights(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("a.attn2.to_k.weight.down"), "'a.attn2.to_k.weight.up' has no fitting 'a.attn2.to_k.weight.down'"),
        (lambda s: s.update({"a.attn2.to_k.weight.up": torch.ones(3, 1)}), "has no fitting"),
        (lambda s: s.update({"a.attn2.to_k.weight.up": torch.ones(2)}), "has no fitting"),
        (lambda s: s.update({"a.attn2.to_k.weight.down": torch.ones(2)}), "has no fitting"),
        (lambda s: s.update({"other": torch.ones(2)}), "'other' is no key of compressed weights"),
        (lambda s: s.update({"other.up": torch.ones(2, 1), "other.down": torch.ones(1, 2)}), "'other' is no key"),
        (lambda s: [s.pop(key) for key in list(s) if key.endswith((".up", ".down"))], "it has no compressed weights"),
    ],
)  # fmt: skip
def test_compressed_files_of_other_things(tmp_path, change, named):
    state = {
        "a.attn2.to_k.weight.up": torch.ones(3, 2),
        "a.attn2.to_k.weight.down": torch.ones(2, 4),
        "a.attn2.to_v.weight.up": torch.ones(3, 1),
        "a.attn2.to_v.weight.down": torch.ones(1, 4),
        "a.attn2.to_out.0.bias": torch.ones(3),
    }
    safetensors.torch.save_file(state, tmp_path / "custom_diffusion_deltas.safetensors")
    weights = read_weights(tmp_path)
    shapes = {"a.attn2.to_k.weight": (3, 4), "a.attn2.to_v.weight": (3, 4), "a.attn2.to_out.0.bias": (3,)}
    assert weights.shapes() == shapes
    assert weights.tensors.keys() == {"a.attn2.to_out.0.bias"}
    change(state)
    safetensors.torch.save_file(state, tmp_path / "custom_diffusion_deltas.safetensors")
    with pytest.raises(ValueError, match=r"custom_diffusion_deltas.safetensors' cannot be used: .*" + re.escape(named)):
        read_weights(tmp_path)


def test_settings_are_readable(concept):
    text = (concept / "custom_diffusion_config.json").read_text()
    assert '\n  "modifier_tokens": ' in text  # a line each
    config = json.loads(text)
    assert config["modifier_tokens"] == ["<new1>"]
    assert read_weights(concept).config == config


# State belongs to the UNet and text encoder, not to the pipeline object


@pytest.fixture
def two_pipelines(tiny_model):
    """Two pipelines that share every part."""
    first = make_pipeline(tiny_model)
    return first, StableDiffusionImg2ImgPipeline.from_pipe(first)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0), (1, 1)])
def test_pipelines_that_share_parts_see_and_restore_the_same(two_pipelines, tiny_model, concept, full_concept, order):
    before, vocabulary = state_of(two_pipelines[0]), two_pipelines[0].tokenizer.get_vocab()
    load_custom_diffusion(two_pipelines[0], concept)
    load_custom_diffusion(two_pipelines[1], full_concept)
    another = make_pipeline(tiny_model)
    load_custom_diffusion(another, full_concept)
    for pipeline in two_pipelines:
        assert_same_state(state_of(pipeline), state_of(another))
    for index in order:
        unload_custom_diffusion(two_pipelines[index])
        assert_same_state(state_of(two_pipelines[0]), before)
        assert two_pipelines[0].tokenizer.get_vocab() == vocabulary


def test_unloading_reaches_the_text_encoder_that_was_loaded(two_pipelines, concept):
    first, second = two_pipelines
    before = state_of(first)
    second.text_encoder, second.tokenizer = copy.deepcopy(first.text_encoder), copy.deepcopy(first.tokenizer)
    load_custom_diffusion(first, concept)
    unload_custom_diffusion(second)
    assert_same_state(state_of(first), before)
    assert "<new1>" not in first.tokenizer.get_vocab()


def test_a_pipeline_is_saved_as_it_was_before(tiny_model, concept, tmp_path):
    pipeline = make_pipeline(tiny_model)
    configuration = copy.deepcopy(pipeline.text_encoder.config.to_dict())
    load_custom_diffusion(pipeline, concept)
    unload_custom_diffusion(pipeline)
    assert pipeline.text_encoder.config.to_dict() == configuration
    pipeline.save_pretrained(tmp_path / "saved")
    assert_same_state(state_of(make_pipeline(tmp_path / "saved")), state_of(pipeline))


def test_random_numbers_are_what_they_would_have_been(tiny_model, concept):
    pipeline = make_pipeline(tiny_model)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    load_custom_diffusion(pipeline, concept)
    unload_custom_diffusion(pipeline)
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_compiled_modules(tiny_model, concept, part):
    plain, pipeline = make_pipeline(tiny_model), make_pipeline(tiny_model)
    before = state_of(pipeline)
    load_custom_diffusion(plain, concept)
    setattr(pipeline, part, torch.compile(getattr(pipeline, part), backend="eager"))
    load_custom_diffusion(pipeline, concept)
    assert np.abs(draw(pipeline) - draw(plain)).max() < 1
    unload_custom_diffusion(pipeline)
    setattr(pipeline, part, getattr(pipeline, part)._orig_mod)
    assert_same_state(state_of(pipeline), before)


def test_modules_compiled_in_place(tiny_model, concept):
    plain, pipeline = make_pipeline(tiny_model), make_pipeline(tiny_model)
    base = draw(plain)
    load_custom_diffusion(plain, concept)
    pipeline.unet.compile(backend="eager")
    assert np.abs(draw(pipeline) - base).max() < 1  # compiled for the base model's weights
    load_custom_diffusion(pipeline, concept)
    assert np.abs(draw(pipeline) - draw(plain)).max() < 1
    unload_custom_diffusion(pipeline)
    assert np.abs(draw(pipeline) - base).max() < 1


@pytest.mark.parametrize("then", [load_custom_diffusion, lambda pipeline, _: unload_custom_diffusion(pipeline)])
def test_after_the_tokens_were_removed_by_somebody_else(tiny_model, concept, then):
    pipeline, expected = make_pipeline(tiny_model), make_pipeline(tiny_model)
    load_custom_diffusion(pipeline, concept)
    pipeline.unload_textual_inversion()
    then(pipeline, concept)
    then(expected, concept)
    assert_same_state(state_of(pipeline), state_of(expected))
    assert pipeline.tokenizer.get_vocab() == expected.tokenizer.get_vocab()


def test_tokens_of_others_stay(tiny_model, concept):
    pipeline = make_pipeline(tiny_model)
    load_custom_diffusion(pipeline, concept)
    pipeline.load_textual_inversion([{"<theirs>": torch.full((32,), 0.5)}], token=["<theirs>"])
    unload_custom_diffusion(pipeline)
    row = pipeline.text_encoder.get_input_embeddings().weight[pipeline.tokenizer.convert_tokens_to_ids("<theirs>")]
    assert torch.equal(row, torch.full((32,), 0.5))
    assert pipeline.text_encoder.config.vocab_size == len(pipeline.text_encoder.get_input_embeddings().weight)


def test_a_fused_lora_is_not_overwritten(tiny_model, concept):
    pipeline = make_pipeline(tiny_model)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    unfused = state_of(pipeline)
    pipeline.fuse_lora()
    fused = state_of(pipeline)
    with pytest.raises(ValueError, match="a LoRA is fused"):
        load_custom_diffusion(pipeline, concept)
    assert_same_state(state_of(pipeline), fused)
    pipeline.unfuse_lora()
    load_custom_diffusion(pipeline, concept)
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="a LoRA is fused"):
        unload_custom_diffusion(pipeline)
    pipeline.unfuse_lora()
    unload_custom_diffusion(pipeline)
    after = state_of(pipeline)
    assert all((after[name] - unfused[name]).abs().max() < 1e-6 for name in unfused)  # fusing itself rounds


# Values that cannot be weights


def spoil_value(change):
    def spoil(folder):
        path = folder / f"{WEIGHTS_NAME}.safetensors"
        state = safetensors.torch.load_file(path)
        key = sorted(key for key in state if key.endswith("to_v_custom_diffusion.weight"))[-1]
        change(state, key)
        safetensors.torch.save_file(state, path)
        return key

    return spoil


def nan_inside(state, key):
    state[key][0, 0] = torch.nan


def whole_numbers(state, key):
    state[key] = state[key].to(torch.int32)


def one_missing(state, key):
    del state[key]


@pytest.mark.parametrize(
    ("change", "said"),
    [(nan_inside, "non-finite values"), (whole_numbers, "torch.int32"), (one_missing, "is missing")],
)
def test_weights_that_are_none_are_refused_by_name(tiny_model, concept, tmp_path, change, said):
    folder = shutil.copytree(concept, tmp_path / "copy")
    key = spoil_value(change)(folder)
    pipeline = make_pipeline(tiny_model)
    before = state_of(pipeline)
    with pytest.raises(ValueError, match=said) as error:
        load_custom_diffusion(pipeline, folder)
    attention = key.partition(".processor")[0]
    assert attention in str(error.value) and "to_v" in str(error.value) and WEIGHTS_NAME in str(error.value)
    assert_same_state(state_of(pipeline), before)


def test_a_token_that_is_not_finite_is_refused(concept, tmp_path):
    folder = shutil.copytree(concept, tmp_path / "copy")
    row = read_weights(concept).tokens["<new1>"].clone()
    row[3] = torch.inf
    safetensors.torch.save_file({"<new1>": row}, folder / "<new1>.safetensors")
    with pytest.raises(ValueError, match=r"<new1>.* has non-finite values"):
        read_weights(folder)


# Scale


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.8, 1.0])
def test_scale_blends_between_the_base_model_and_what_was_trained(tiny_model, full_concept, scale):
    base, trained, pipeline = (make_pipeline(tiny_model) for _ in range(3))
    load_custom_diffusion(trained, full_concept)
    load_custom_diffusion(pipeline, full_concept, scale=scale)
    before, after, blended = (state_of(p) for p in (base, trained, pipeline))
    for name in before:
        if name.startswith("unet."):
            wanted = before[name] + scale * (after[name] - before[name])
            assert torch.allclose(blended[name], wanted, atol=1e-6), name
    rows = [p.text_encoder.get_input_embeddings().weight for p in (pipeline, trained)]
    assert torch.equal(*rows)
    if scale in (0.0, 1.0):
        end = before if scale == 0 else after
        assert all(torch.equal(blended[name], end[name]) for name in before if name.startswith("unet."))
    unload_custom_diffusion(pipeline)
    assert_same_state(state_of(pipeline), before)


# Files, written tensor by tensor


def test_files_are_those_of_the_library(tmp_path):
    random = torch.Generator().manual_seed(0)
    state = {
        "b": torch.randn(3, 5, generator=random), "a": torch.randn(7, generator=random).half(), "\u00e4": torch.zeros(0),
        "alpha": torch.tensor(4.0), "c": torch.randn(4, 6, generator=random).T, "d": torch.ones(3).bfloat16(),
        "e": torch.ones(2, dtype=torch.float64),
    }  # fmt: skip
    save_tensors(state, tmp_path / "ours", {"format": "pt"})
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(state)
    read = safetensors.torch.load_file(tmp_path / "ours")
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in state.items())
    library = safetensors.torch.save({n: t.contiguous() for n, t in state.items()}, metadata={"format": "pt"})
    assert (tmp_path / "ours").stat().st_size == len(library)


def test_states_are_those_of_torch(tmp_path):
    state = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4.0)}}, "lr": 0.1}}
    save_state(state, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert read["optimizer"]["lr"] == 0.1 and torch.equal(read["optimizer"]["state"][0]["exp_avg"], torch.ones(3))


@pytest.mark.parametrize("save", [save_tensors, save_state])
def test_a_full_disk_says_so(save):
    with pytest.raises(OSError, match="No space left on device") as raised:
        save({"x": torch.zeros(1_000_000)}, Path("/dev/full"))
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.parametrize("save", ["save_tensors", "save_state"])
def test_nothing_is_held_twice_while_it_is_written(save, tmp_path):
    """200 MB in a process that may take only 60 MB more."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from custom_diffusion.weights.format import {save}
state = {{str(n): torch.ones(2_500_000) for n in range(20)}}
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 60_000_000, taken + 60_000_000))
{save}(state, Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "file").stat().st_size > 200_000_000
