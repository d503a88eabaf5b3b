"""What differs between Stable Diffusion and SDXL: text, conditions beside it, VAE, files of words, pipelines."""

import copy
import json
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from test_invariants import PROMPTS, make_concept_model, pipeline_features, step, write
from test_objective import PAIRS
from tiny import make_vae

from custom_diffusion import load_custom_diffusion, read_weights, unload_custom_diffusion
from custom_diffusion.errors import InputError
from custom_diffusion.families import FAMILIES, STABLE_DIFFUSION, STABLE_DIFFUSION_XL, family_of
from custom_diffusion.files import CONFIG_NAME, WEIGHTS_NAME
from custom_diffusion.model.loading import load_models, load_pipeline, load_text, vae_dtype
from custom_diffusion.model.source import ModelSource, base_of, check_model
from custom_diffusion.training.augmentation import Augmentation, ClassCrop, class_time_ids, photo_time_ids
from custom_diffusion.training.latents import LatentEncoder
from custom_diffusion.weights.format import write_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def concept(tmp_path_factory, tiny_xl_model):
    """A folder as training writes it, after a step."""
    folder = tmp_path_factory.mktemp("concept")
    model, _, _ = make_concept_model(tiny_xl_model)
    step(model)
    write(folder, model)
    return folder


def open_pipeline(model, kind=StableDiffusionXLPipeline, **parts):
    pipe = kind.from_pretrained(model, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Which family


def test_the_family_is_told_from_the_models_parts(tiny_model, tiny_xl_model):
    families = [STABLE_DIFFUSION, STABLE_DIFFUSION_XL]
    for model, family in zip((tiny_model, tiny_xl_model), families):
        assert check_model(ModelSource(str(model)))[0].family is family
        assert family_of(DiffusionPipeline.from_pretrained(model).components) is family
    assert [family.text_to_image for family in families] == [
        pipeline.__name__ for pipeline in (StableDiffusionPipeline, StableDiffusionXLPipeline)
    ]


def test_what_is_drawn_from_before_the_model_knows_its_options(tiny_xl_model, tmp_path):
    shape, _ = check_model(ModelSource(str(tiny_xl_model)))
    assert shape.pipeline_options == {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
    model = shutil.copytree(tiny_xl_model, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    shape, _ = check_model(ModelSource(str(model)))
    assert shape.pipeline_options["force_zeros_for_empty_prompt"] is False


@pytest.mark.parametrize("part", ["text_encoder_2", "unet"])
def test_a_model_with_another_width_or_without_weights_is_named(part, tiny_xl_model, tmp_path):
    model = shutil.copytree(tiny_xl_model, tmp_path / "model")
    if part == "unet":
        config = model / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 64}))
    else:
        (model / part / "model.safetensors").unlink()
    with pytest.raises(InputError) as raised:
        check_model(ModelSource(str(model)))
    (line,) = raised.value.problems
    assert "another width than its text encoders make" in line or "text_encoder_2' has no weight files" in line


def test_missing_weights_of_the_second_text_encoder_are_named(tiny_xl_model, tmp_path):
    model = shutil.copytree(tiny_xl_model, tmp_path / "model")
    file = model / "text_encoder_2" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors.pop("text_projection.weight")
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights of its text encoder 2 are missing, text_projection\.weight first"):
        load_text(ModelSource(str(model)), CPU)


# Text


def test_every_prompt_is_encoded_as_itself_and_as_the_pipeline_does(any_model):
    text = load_text(ModelSource(str(any_model)), CPU)
    text.add_words(PAIRS)
    prompts = [*PROMPTS, "a pot", "a far away photo of a <new1> cat", ""]
    encoded = text.encode(prompts)
    plain = [prompt.replace("<new1>", "ktn").replace("<new2>", "pll") for prompt in prompts]  # from which they start
    expected = pipeline_features(DiffusionPipeline.from_pretrained(any_model), plain)
    for ours, theirs in zip(encoded, expected, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, atol=1e-5)
    for features in encoded:
        if features is not None:
            different = (features[:, None] - features[None]).flatten(2).abs().amax(dim=2) > 1e-3
            assert different.sum() == len(prompts) ** 2 - len(prompts) - 2  # but for "a pot", which is there twice


def test_predictions_are_those_of_the_pipeline(tiny_xl_model):
    """Text and conditions put together by diffusers' own methods."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_xl_model)
    model, _, _ = make_concept_model(tiny_xl_model, pairs=[])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    timesteps = torch.tensor([400])
    with torch.no_grad():
        features, pooled = pipeline_features(pipe, ["photo of a cat"])
        time_ids = pipe._get_add_time_ids((70, 90), (3, 5), (64, 64), torch.float32, pooled.shape[-1])
        added = {"text_embeds": pooled, "time_ids": time_ids}
        expected = pipe.unet(latents, timesteps, features, added_cond_kwargs=added).sample
        ours = model(latents, timesteps, ["photo of a cat"], torch.tensor([[70.0, 90, 3, 5, 64, 64]]))
        other = model(latents, timesteps, ["photo of a cat"], torch.tensor([[70.0, 90, 3, 25, 64, 64]]))
    assert torch.allclose(ours, expected, atol=1e-6)
    assert (other - expected).abs().max() > 1e-4


def test_pooled_features_come_from_the_end_of_the_prompt(tiny_xl_model):
    """A new word's id is larger than the end token's, by which encoders with the usual wrong configuration would go."""
    text = load_text(ModelSource(str(tiny_xl_model)), CPU)
    assert text.encoders[1].config.eos_token_id == 2
    before = text.encode(["photo of a ktn cat"])[1]
    text.add_words(PAIRS)
    assert torch.allclose(text.encode(["photo of a <new1> cat"])[1], before, atol=1e-6)
    text.remove_words()
    assert text.encoders[1].config.eos_token_id == 2


def test_all_words_learn_in_both_text_encoders_from_features_and_pooled_features(tiny_xl_model):
    model, _, _ = make_concept_model(tiny_xl_model)
    before = [rows.detach().clone() for rows in model.text.trained_rows()]
    step(model)
    assert [tuple(rows.shape) for rows in model.text.trained_rows()] == [(2, 32), (2, 40)]
    for rows, earlier in zip(model.text.trained_rows(), before):
        assert (rows - earlier).abs().amax(dim=1).min() > 0
    _, pooled = model.text.encode(["a <new2> pot"])
    (gradient,) = torch.autograd.grad(pooled.sum(), model.text.trained_rows()[1])
    assert gradient[0].abs().max() == 0 and gradient[1].abs().max() > 0


def test_saved_words_are_loaded_into_the_rows_they_came_from(tiny_xl_model):
    model, _, _ = make_concept_model(tiny_xl_model)
    step(model)
    fresh, _, _ = make_concept_model(tiny_xl_model)
    fresh.load_trained(model.trained_weights({}))
    for parameter, other in zip(fresh.trained_parameters(), model.trained_parameters(), strict=True):
        assert torch.equal(parameter, other)


# Files of words


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_of_words_have_a_row_for_each_text_encoder(suffix, concept):
    if suffix == "bin":
        state = torch.load(concept / "<new2>.bin", weights_only=True)
    else:
        state = safetensors.torch.load_file(concept / "<new2>.safetensors")
    assert {key: tuple(rows.shape) for key, rows in state.items()} == {"clip_l": (1, 32), "clip_g": (1, 40)}
    assert (concept / f"<new2>.{suffix}").stat().st_size < 4096
    weights = read_weights(concept)
    assert weights.token_widths == (32, 40)
    assert torch.equal(weights.tokens["<new2>"], torch.cat([state["clip_l"], state["clip_g"]], dim=1)[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: {"clip_l": state["clip_l"]}, "it lacks 'clip_g'"),
        (lambda state: {"clip_g": state["clip_g"]}, "it lacks 'clip_l'"),
        (lambda state: state | {"clip_h": state["clip_l"].clone()}, "not the embedding of '<new1>'"),
        (lambda state: {key: row.repeat(2, 1) for key, row in state.items()}, "not the embedding of '<new1>'"),
        (lambda state: {key: row[0] for key, row in state.items()}, "not the embedding of '<new1>'"),
        (lambda state: {"<new1>": state["clip_l"][0]}, "embeddings of different models"),
    ],
)
def test_files_that_hold_other_words_are_named(change, named, concept, tmp_path):
    folder = shutil.copytree(concept, tmp_path / "concept")
    state = safetensors.torch.load_file(folder / "<new1>.safetensors")
    safetensors.torch.save_file(change(state), folder / "<new1>.safetensors")
    with pytest.raises(ValueError, match=named):
        read_weights(folder)


# Pipelines


def state_of(pipe):
    modules = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "text_encoder_2")}
    state = {f"{part}.{n}": t.clone() for part, module in modules.items() for n, t in module.state_dict().items()}
    said = [pipe.text_encoder.config.to_dict(), pipe.text_encoder_2.config.to_dict()]
    return state, [pipe.tokenizer.get_vocab(), pipe.tokenizer_2.get_vocab(), *copy.deepcopy(said)]


def assert_same(before, after):
    assert before[1] == after[1] and before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name


def of_kind(kind, model):
    parts = {}
    if kind is StableDiffusionXLControlNetPipeline:
        unet = DiffusionPipeline.from_pretrained(model).unet
        parts["controlnet"] = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16))
    return open_pipeline(model, kind, **parts)


def draw(pipe, prompt="photo of a <new1> cat"):
    image = Image.new("RGB", (64, 64), (90, 120, 200))
    extra = {
        StableDiffusionXLPipeline: {"height": 64, "width": 64},
        StableDiffusionXLImg2ImgPipeline: {"image": image, "strength": 0.9},
        StableDiffusionXLInpaintPipeline: {
            "image": image, "mask_image": Image.new("L", (64, 64), 255), "height": 64, "width": 64, "strength": 0.9,
        },
        StableDiffusionXLControlNetPipeline: {"image": image, "height": 64, "width": 64},
    }[type(pipe)]  # fmt: skip
    random = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe(prompt, num_inference_steps=2, generator=random, output_type="np", **extra).images[0])


KINDS = [
    StableDiffusionXLPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
]


@pytest.mark.parametrize("kind", KINDS)
def test_loading_changes_what_is_drawn_and_unloading_restores_every_bit(kind, tiny_xl_model, concept):
    pipe = of_kind(kind, tiny_xl_model)
    before, base = state_of(pipe), draw(pipe, "photo of a cat")
    load_custom_diffusion(pipe, concept)
    weights = read_weights(concept)
    row = torch.cat(
        [
            encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<new2>")]
            for encoder, tokenizer in ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
        ]
    )
    assert torch.equal(row, weights.tokens["<new2>"])
    assert (draw(pipe, "photo of a cat") - base).abs().max() > 1e-3
    unload_custom_diffusion(pipe)
    assert_same(before, state_of(pipe))
    assert torch.equal(draw(pipe, "photo of a cat"), base)


def test_what_is_loaded_is_what_was_trained_in_pipelines_that_share_parts(tiny_xl_model, concept):
    pipe = open_pipeline(tiny_xl_model)
    before = state_of(pipe)
    other = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    load_custom_diffusion(pipe, concept)
    drawn = draw(pipe)
    load_custom_diffusion(other, concept)  # in its place
    assert torch.equal(draw(pipe), drawn)
    load_custom_diffusion(pipe, concept, scale=0.0)
    assert not torch.equal(draw(pipe), drawn)
    unload_custom_diffusion(other)
    assert_same(before, state_of(pipe))


def test_diffusers_alone_loads_the_same_but_for_where_it_pools(tiny_xl_model, concept):
    """Why a folder is best loaded by `load_custom_diffusion`: the encoders' configuration must be put right as well."""
    ours, theirs = open_pipeline(tiny_xl_model), open_pipeline(tiny_xl_model)
    load_custom_diffusion(ours, concept)
    theirs.unet.load_attn_procs(concept, weight_name=f"{WEIGHTS_NAME}.bin", _pipeline=theirs)
    state = safetensors.torch.load_file(concept / "<new1>.safetensors")
    for key, suffix in (("clip_g", "_2"), ("clip_l", "")):
        tokenizer, encoder = getattr(theirs, f"tokenizer{suffix}"), getattr(theirs, f"text_encoder{suffix}")
        theirs.load_textual_inversion(state[key], token="<new1>", tokenizer=tokenizer, text_encoder=encoder)
    features, pooled = pipeline_features(theirs, ["photo of a <new1> cat"])
    own_features, own_pooled = pipeline_features(ours, ["photo of a <new1> cat"])
    assert torch.allclose(features, own_features, atol=1e-5)
    assert not torch.allclose(pooled, own_pooled, atol=1e-3)
    theirs.text_encoder_2.text_model.eos_token_id = theirs.tokenizer_2.eos_token_id
    assert torch.allclose(pipeline_features(theirs, ["photo of a <new1> cat"])[1], own_pooled, atol=1e-5)
    assert (draw(ours) - draw(theirs)).abs().max() < 4e-3


def test_a_pipeline_saved_with_the_words_in_reads_them_alike(tiny_xl_model, concept, tmp_path):
    """By diffusers alone, pooled features included."""
    pipe = open_pipeline(tiny_xl_model)
    load_custom_diffusion(pipe, concept)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    for features, expected in zip(pipeline_features(again, PROMPTS), pipeline_features(pipe, PROMPTS), strict=True):
        assert torch.allclose(features, expected, atol=1e-6)


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_pipelines(offload, tiny_xl_model, concept):
    plain, pipe = open_pipeline(tiny_xl_model), open_pipeline(tiny_xl_model)
    load_custom_diffusion(plain, concept)
    getattr(pipe, offload)(device="cpu")
    load_custom_diffusion(pipe, concept)
    for module, child in ((pipe.unet, "conv_in"), (pipe.text_encoder_2, "text_projection")):
        assert hasattr(module, "_hf_hook") or hasattr(module.get_submodule(child), "_hf_hook")
    pipe.remove_all_hooks()
    assert_same(state_of(plain), state_of(pipe))


def test_compiled_text_encoders(tiny_xl_model, concept):
    """That the new words are pooled at the end of the prompt must reach the compiled code."""
    pipe, compiled = open_pipeline(tiny_xl_model), open_pipeline(tiny_xl_model)
    before = state_of(compiled)
    compiled.text_encoder_2 = torch.compile(compiled.text_encoder_2, backend="eager")
    pipeline_features(compiled, PROMPTS[:1])
    load_custom_diffusion(pipe, concept)
    load_custom_diffusion(compiled, concept)
    for features, expected in zip(*(pipeline_features(p, PROMPTS) for p in (compiled, pipe)), strict=True):
        assert torch.allclose(features, expected, atol=1e-5)
    unload_custom_diffusion(compiled)
    compiled.text_encoder_2 = compiled.text_encoder_2._orig_mod
    assert_same(before, state_of(compiled))


def test_weights_of_another_family_are_refused_and_change_nothing(tiny_model, tiny_xl_model, concept, tmp_path):
    pipe = open_pipeline(tiny_model, StableDiffusionPipeline)
    vocabulary = pipe.tokenizer.get_vocab()
    with pytest.raises(ValueError, match="cross-attentions of another model"):
        load_custom_diffusion(pipe, concept)
    assert pipe.tokenizer.get_vocab() == vocabulary
    weights = read_weights(concept)
    weights.token_widths = (40, 32)
    with pytest.raises(ValueError, match=r"the embedding of <new1> is \(72,\), the model's have 32 \+ 40 values"):
        load_custom_diffusion(open_pipeline(tiny_xl_model), weights)
    weights.token_widths = ()
    with pytest.raises(ValueError, match=r"the embedding of <new1> is \(32,\)"):
        weights.tokens = {token: row[:32] for token, row in weights.tokens.items()}
        load_custom_diffusion(open_pipeline(tiny_xl_model), weights)


# VAE and what the model predicts


@pytest.fixture
def other_vae(tmp_path):
    """A VAE that is safe in half precision, and whose channels have means and deviations."""
    torch.manual_seed(7)
    scales = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 4.0, 8.0], "scaling_factor": 0.5}
    make_vae(force_upcast=False, **scales).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vae_that_overflows_stays_in_float32(dtype, tiny_model, tiny_xl_model, other_vae):
    assert vae_dtype(ModelSource(str(tiny_model)), dtype) == dtype
    assert vae_dtype(ModelSource(str(tiny_xl_model)), dtype) == torch.float32
    assert vae_dtype(ModelSource(str(tiny_xl_model), vae=str(other_vae)), dtype) == dtype
    _, _, vae = load_models(ModelSource(str(tiny_xl_model)), dtype, CPU)
    assert vae.dtype == torch.float32


def test_channels_have_their_own_scale_where_the_vae_says_so(tiny_xl_model, other_vae):
    source = ModelSource(str(tiny_xl_model), vae=str(other_vae))
    _, _, vae = load_models(source, torch.float32, CPU)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"pixel_values": pixels, "posterior_noise": torch.zeros(1, 4, 16, 16)}
    latents = LatentEncoder(vae, None)(batch)
    # What the pipeline does before it decodes takes them back.
    pipe = load_pipeline(source, torch.float32)
    mean, std = (torch.tensor(pipe.vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(other_vae).encode(pixels).latent_dist.mean
    assert torch.allclose(latents * std / pipe.vae.config.scaling_factor + mean, expected, atol=1e-5)


def test_another_vae_is_named_when_it_does_not_fit_or_cannot_be_read(tiny_xl_model, other_vae, tmp_path):
    (tmp_path / "empty").mkdir()
    for vae, said in ((tmp_path / "empty", "cannot be read as a VAE"), (other_vae, "latents of another shape")):
        config = other_vae / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 8}))
        with pytest.raises(InputError, match=f"^--pretrained_vae_model_name_or_path: '{vae}'.*{said}"):
            check_model(ModelSource(str(tiny_xl_model), vae=str(vae)))


def test_the_tools_draw_with_the_vae_and_the_prediction_type_of_training(any_model, other_vae, capsys):
    settings = {"pretrained_vae_model_name_or_path": str(other_vae), "prediction_type": "v_prediction"}
    config = {"base_model": str(any_model), "settings": settings}
    for source in (base_of(config, None, None, None), base_of(config, str(any_model), None, None)):
        pipe = load_pipeline(source, torch.float32)
        assert pipe.scheduler.config.prediction_type == "v_prediction"
        assert pipe.vae.config.scaling_factor == 0.5
    _, scheduler = check_model(base_of(config, None, None, None))
    assert scheduler.config.prediction_type == "v_prediction"
    settings["pretrained_vae_model_name_or_path"] = "/not/there"
    assert load_pipeline(base_of(config, None, None, None), torch.float32).vae.config.scaling_factor < 0.2
    assert "'/not/there', which is not there; the model's own is used" in capsys.readouterr().err
    assert load_pipeline(base_of({"base_model": str(any_model)}, None, None, None), torch.float32).scheduler.config.prediction_type == "epsilon"  # fmt: skip


# Micro-conditioning


def photo(width, height):
    return Image.new("RGB", (width, height))


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        # Not augmented: a square of 100 from x = 30 of a photo of 200 x 100, shown at 64.
        (Augmentation(False, (30, 0, 130, 100), 64, 0, 0, "", False), (0, 19.2)),
        # In the mirror 70 pixels are to the left of it.
        (Augmentation(True, (30, 0, 130, 100), 64, 0, 0, "", False), (0, 44.8)),
        # Enlarged to 80 and cut at (10, 4): in addition to the square's own place.
        (Augmentation(False, (30, 0, 130, 100), 80, 10, 4, "", False), (4, 34)),
        (Augmentation(True, (30, 0, 130, 100), 80, 10, 4, "", False), (4, 66)),
        # Pasted at (20, 12) of the canvas: all of the square is seen.
        (Augmentation(False, (30, 0, 130, 100), 32, 20, 12, "", True), (0, 9.6)),
    ],
)
def test_crop_of_a_photo(augmentation, expected):
    time_ids = photo_time_ids(augmentation, photo(200, 100), (1000, 500), 64)
    assert time_ids.tolist() == pytest.approx([500, 1000, *expected, 64, 64], abs=1e-4)


def test_crop_of_a_class_image():
    assert class_time_ids(ClassCrop(128, 64, 10, 0, False), (256, 128), 64).tolist() == [128, 256, 0, 10, 64, 64]
    assert class_time_ids(ClassCrop(128, 64, 10, 0, True), (256, 128), 64).tolist() == [128, 256, 0, 54, 64, 64]
    assert class_time_ids(ClassCrop(64, 96, 0, 31, True), (40, 60), 64).tolist() == [60, 40, 31, 0, 64, 64]


def test_every_family_has_what_the_rest_relies_on():
    for family in FAMILIES:
        assert (len(family.texts) > 1) == all(text.key for text in family.texts)
        assert {text.encoder for text in family.texts}.isdisjoint(text.tokenizer for text in family.texts)


def test_settings_of_a_trained_folder_survive_writing(concept, tmp_path, tiny_xl_model):
    weights = read_weights(concept)
    write_weights(tmp_path / "again", weights, DiffusionPipeline.from_pretrained(tiny_xl_model).unet, ("safetensors",))
    again = read_weights(tmp_path / "again")
    assert again.token_widths == weights.token_widths and list(again.tokens) == list(weights.tokens)
    assert json.loads((tmp_path / "again" / CONFIG_NAME).read_text()) == weights.config
