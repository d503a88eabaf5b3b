"""What may change in a training step, in which precision, and that what is saved is what was trained."""

import copy

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from test_objective import PAIRS
from tiny import WORDS

from custom_diffusion import load_custom_diffusion
from custom_diffusion.model.attention import (
    install_trained_projections,
    remove_trained_projections,
    trained_tensors,
)
from custom_diffusion.model.concept_model import ConceptModel, cast_frozen
from custom_diffusion.model.loading import load_models, load_tokenizer
from custom_diffusion.model.source import ModelSource
from custom_diffusion.model.tokens import (
    modifier_embeddings,
    token_problems,
)
from custom_diffusion.training.augmentation import PROMPT_PREFIXES
from custom_diffusion.training.objective import custom_diffusion_losses
from custom_diffusion.training.readback import read_back
from custom_diffusion.training.validation import Validation
from custom_diffusion.weights.format import write_weights

PROMPTS = ["photo of a <new1> cat", "a <new2> pot", "photo of a cat", "a pot"]


def make_concept_model(model, freeze_model="crossattn_kv", pairs=PAIRS, dtype=torch.float32):
    unet, text, vae = load_models(ModelSource(str(model)), dtype, torch.device("cpu"))
    plain_tokenizers = copy.deepcopy(text.tokenizers)
    install_trained_projections(unet, freeze_model)
    text.add_words(pairs)
    cast_frozen(unet, dtype)
    cast_frozen(text, dtype)
    return ConceptModel(unet, text), plain_tokenizers, vae


def time_ids_for(prompts):
    return torch.tensor([[70.0, 90, 3, 5, 64, 64], [300, 200, 0, 0, 64, 64]]).repeat(len(prompts), 1)[: len(prompts)]


def random_latents(unet, count, seed=0):
    """(count, C, 16, 16), of all that the UNet takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, unet.config.in_channels, 16, 16, generator=generator)


def step(concept_model, prompts=PROMPTS, learning_rate=1e-2):
    latents = random_latents(concept_model.unet, len(prompts))
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(concept_model.trained_parameters(), lr=learning_rate, fused=True)
    timesteps = torch.tensor([100, 300, 500, 900])[: len(prompts)]
    pred = concept_model(latents, timesteps, prompts, time_ids_for(prompts))
    mask = torch.ones(len(prompts) // 2 or 1, 1, 16, 16)
    custom_diffusion_losses(pred, noise, mask, 1.0)["loss"].backward()
    optimizer.step()


def write(folder, concept_model, pairs=PAIRS):
    weights = concept_model.trained_weights({"modifier_tokens": [token for token, _ in pairs]})
    assert list(weights.tokens) == weights.config["modifier_tokens"]
    write_weights(folder, weights, concept_model.unet, ("safetensors", "bin"))


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_a_step_changes_the_trained_parameters_and_nothing_else(any_unet, freeze_model):
    concept_model, _, vae = make_concept_model(any_unet, freeze_model)
    before = {name: p.detach().clone() for name, p in concept_model.named_parameters()}
    encoder = {name: p.detach().clone() for name, p in vae.named_parameters()}
    step(concept_model)
    kv = ("attn2.to_k.weight", "attn2.to_v.weight")
    trained = (
        kv
        if freeze_model == "crossattn_kv"
        else (*kv, "attn2.to_q.weight", "attn2.to_out.0.weight", "attn2.to_out.0.bias")
    )
    for name, parameter in concept_model.named_parameters():
        if name.endswith((*trained, "modifiers.weight")):
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]), name
    for name, parameter in vae.named_parameters():
        assert torch.equal(parameter, encoder[name])


def test_removed_projections_are_plain_and_good_for_nothing_until_weights_are_loaded(tiny_model):
    unet = make_concept_model(tiny_model, "crossattn", pairs=[])[0].unet
    trained = {name: parameter.shape for name, parameter in trained_tensors(unet).items()}
    every = {name for name, _ in unet.named_parameters()}
    remove_trained_projections(unet, torch.bfloat16)
    assert trained_tensors(unet) == {}
    assert {name for name, _ in unet.named_parameters()} == every
    for name, shape in trained.items():
        parameter = unet.get_parameter(name)
        assert parameter.shape == shape and parameter.dtype == torch.bfloat16
        assert parameter.isnan().all() and not parameter.requires_grad
    elsewhere = make_concept_model(tiny_model, pairs=[])[0].unet.to("meta")
    remove_trained_projections(elsewhere, torch.bfloat16)
    assert {parameter.device.type for parameter in elsewhere.parameters()} == {"meta"}


def test_without_tokens_the_embedding_stays_and_removing_them_puts_it_back(any_model):
    with_tokens, without = (make_concept_model(any_model, pairs=pairs)[0].text for pairs in (PAIRS, []))
    tables = [text_encoder.get_input_embeddings() for text_encoder in without.encoders]
    for table, text_encoder in zip(tables, without.encoders, strict=True):
        assert isinstance(table, torch.nn.Embedding) and not table.weight.requires_grad
        assert modifier_embeddings(text_encoder) is None
    for text in (with_tokens, without):
        text.remove_words()
        for table, text_encoder in zip(tables, text.encoders, strict=True):
            assert modifier_embeddings(text_encoder) is None
            assert torch.equal(text_encoder.get_input_embeddings().weight, table.weight)
    for table, text_encoder in zip(tables, without.encoders):
        assert text_encoder.get_input_embeddings() is table


def test_modifier_rows_start_from_their_initializers(any_model):
    concept_model, tokenizers, _ = make_concept_model(any_model)
    for text_encoder, tokenizer in zip(concept_model.text.encoders, tokenizers, strict=True):
        table = text_encoder.get_input_embeddings().base.weight
        ids = tokenizer.convert_tokens_to_ids(["ktn</w>", "pll</w>"])
        assert torch.equal(modifier_embeddings(text_encoder), table[ids])
        assert len(table) == len(tokenizer)
    # Before any step, a modifier token reads as its initializer.
    for features in concept_model.text.encode(["photo of a <new1> cat", "photo of a ktn cat"]):
        assert features is None or torch.equal(features[0], features[1])


def test_no_gradient_through_the_start_token(tiny_model):
    concept_model, _, _ = make_concept_model(tiny_model, pairs=[])
    layer = next(m for m in concept_model.unet.modules() if getattr(m, "detach_start_token", False))
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad[:, 0].abs().max() == 0
    assert x.grad[:, 1:].abs().min() > 0
    assert torch.allclose(layer.weight.grad[0], x[:, 1:].sum(dim=(0, 1)), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_fp32_copies_of_fp32_weights(any_unet, dtype):
    concept_model, _, vae = make_concept_model(any_unet, "crossattn_kv", dtype=dtype)
    full = DiffusionPipeline.from_pretrained(any_unet)
    for name, parameter in trained_tensors(concept_model.unet).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, full.unet.get_parameter(name))
    text = concept_model.text
    ids = full.tokenizer.convert_tokens_to_ids(["ktn</w>", "pll</w>"])
    for part, rows in zip(text.family.texts, text.trained_rows(), strict=True):
        assert rows.dtype == torch.float32
        assert torch.equal(rows, getattr(full, part.encoder).get_input_embeddings().weight[ids])
    assert {p.dtype for p in concept_model.parameters() if not p.requires_grad} == {dtype}
    assert {p.dtype for p in vae.parameters()} == {torch.float32 if text.family.vae_overflows else dtype}
    assert text.dtype == dtype


def test_bfloat16_trains_close_to_float32(any_unet):
    changes = []
    for dtype in (torch.float32, torch.bfloat16):
        concept_model, _, _ = make_concept_model(any_unet, "crossattn", dtype=dtype)
        latents = random_latents(concept_model.unet, 2)
        pred = concept_model(latents, torch.tensor([100, 700]), PROMPTS[:2], time_ids_for(PROMPTS[:2]))
        assert pred.dtype == dtype
        custom_diffusion_losses(pred, latents[:, :4], torch.ones(2, 1, 16, 16), 1.0)["loss"].backward()
        changes.append(torch.cat([p.grad.flatten() for p in concept_model.trained_parameters()]))
    assert changes[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.99


def pipeline_features(pipe, prompts):
    """As the pipeline itself encodes them: (B, T, D), and pooled (B, P) or None."""
    encoded = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return encoded[0], encoded[2] if len(encoded) == 4 else None


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_a_fresh_pipeline_predicts_what_was_trained(tmp_path, any_unet, freeze_model):
    concept_model, _, _ = make_concept_model(any_unet, freeze_model)
    step(concept_model)
    write(tmp_path, concept_model)
    fresh = DiffusionPipeline.from_pretrained(any_unet)
    load_custom_diffusion(fresh, tmp_path)
    latents = random_latents(fresh.unet, 4, seed=3)
    timesteps = torch.tensor([1, 300, 600, 999])
    time_ids = time_ids_for(PROMPTS)
    with torch.no_grad():
        trained = concept_model(latents, timesteps, PROMPTS, time_ids)
        features, pooled = pipeline_features(fresh, PROMPTS)
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}
        loaded = fresh.unet(latents, timesteps, features, added_cond_kwargs=added).sample
    assert (trained - loaded).abs().max() <= 1e-5 * trained.abs().max()


def read_back_of(tmp_path, any_unet, concept_model, tokenizers):
    scheduler = DDPMScheduler.from_pretrained(any_unet, subfolder="scheduler")
    validation = Validation(
        Accelerator(cpu=True), tmp_path, ModelSource(str(any_unet)), scheduler, prompt=None, num_images=2, size=64,
        seed=0, dtype=torch.float32, pipeline_options=concept_model.text.family.pipeline_options,
    )  # fmt: skip
    return read_back(
        tmp_path,
        concept_model,
        validation.pipeline,
        tokenizers,
        prompt=PROMPTS[0],
        latent_shape=(1, concept_model.unet.config.in_channels, 16, 16),
    )


def test_read_back_notices_wrong_weights(tmp_path, any_unet):
    concept_model, tokenizers, _ = make_concept_model(any_unet)
    step(concept_model)
    write(tmp_path, concept_model)
    step(concept_model)  # the folder is now a step behind
    with pytest.raises(RuntimeError, match="do not predict what was trained"):
        read_back_of(tmp_path, any_unet, concept_model, tokenizers)


def test_read_back_returns_the_loaded_pipeline(tmp_path, any_unet):
    concept_model, tokenizers, _ = make_concept_model(any_unet, "crossattn")
    step(concept_model)
    write(tmp_path, concept_model)
    expected = {name: p.detach().clone() for name, p in trained_tensors(concept_model.unet).items()}
    pipeline = read_back_of(tmp_path, any_unet, concept_model, tokenizers)
    for name, tensor in expected.items():
        assert torch.equal(pipeline.unet.get_parameter(name), tensor)
    assert "<new1>" in pipeline.tokenizer.get_vocab()


def test_class_prompts_are_encoded_once(any_model):
    concept_model, _, _ = make_concept_model(any_model)
    text, calls = concept_model.text, []
    for text_encoder in text.encoders:
        text_encoder.register_forward_hook(lambda *_: calls.append(1))
    first = text.encode(PROMPTS)
    assert len(calls) == 3 * len(text.encoders)  # the prompts with modifier tokens together, and each of the others
    second = text.encode(PROMPTS)
    assert len(calls) == 4 * len(text.encoders)
    for one, other in zip(first, second):
        assert (one is None and other is None) or torch.equal(one, other)
    assert not any(part.requires_grad for part in text.constant_features["a pot"] if part is not None)


def test_tokenizer_checks(tiny_model):
    tokenizer = load_tokenizer(ModelSource(str(tiny_model)))
    size = len(tokenizer)
    assert token_problems(tokenizer, PAIRS, [[prompt] for prompt in PROMPTS[:2]]) == []
    assert "already has 'cat</w>'" in token_problems(tokenizer, [("cat</w>", "ktn")], [])[0]
    assert "'tree' is 4 tokens" in token_problems(tokenizer, [("<new1>", "tree")], [])[0]
    long_prompt = " ".join(WORDS[:12]) + " <new1>"
    assert "cut off" in token_problems(tokenizer, PAIRS[:1], [[prefix + long_prompt for prefix in PROMPT_PREFIXES]])[0]
    assert len(tokenizer) == size


def test_a_prompt_that_is_too_long_is_named_once_with_all_that_it_loses(tiny_model):
    tokenizer = load_tokenizer(ModelSource(str(tiny_model)))
    both, one = "a " * 14 + "<new2> <new1>", "a " * 13 + "<new1> <new2>"
    forms = [[prefix + prompt for prefix in PROMPT_PREFIXES] for prompt in (both, PROMPTS[0], one)]
    first, second = token_problems(tokenizer, PAIRS, forms)
    assert f"in {both!r} <new1>, <new2> is cut off" in first
    assert f"in {one!r} <new2> is cut off" in second


def test_every_pair_that_the_tokenizer_refuses_is_named(tiny_model):
    tokenizer = load_tokenizer(ModelSource(str(tiny_model)))
    lines = token_problems(tokenizer, [("cat", "tree"), ("<New1>", "ktn"), ("pot", "pll")], [["a cat"]])
    assert [line.split(":")[0] for line in lines] == ["--modifier_token", "--initializer_token", "--modifier_token", "--modifier_token"]  # fmt: skip
    assert [quoted in line for quoted, line in zip(("'cat'", "'tree'", "'pot'", "'<New1>'"), lines)] == [True] * 4
