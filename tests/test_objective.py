"""Loss and gradients against a plainly written version on diffusers' own Custom Diffusion processors."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from tiny import make_class_folder, make_pictures
from transformers import CLIPTextModel, CLIPTokenizer

from custom_diffusion.class_folder import read_class_folder
from custom_diffusion.model.attention import install_trained_projections, trained_tensors
from custom_diffusion.model.concept_model import ConceptModel
from custom_diffusion.model.loading import load_models
from custom_diffusion.model.source import ModelSource
from custom_diffusion.training.latents import LatentEncoder
from custom_diffusion.training.objective import custom_diffusion_losses, masked_loss, prediction_target
from custom_diffusion.training.samples import SampleSettings, TrainingSamples, collate
from custom_diffusion.weights.format import to_file_keys

PAIRS = [("<new1>", "ktn"), ("<new2>", "pll")]
PRIOR_LOSS_WEIGHT = 0.7


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    photos = [(p, "photo of a <new1> cat") for p in make_pictures(folder / "cat", 2).iterdir()]
    photos += [(p, "photo of a <new2> pot") for p in make_pictures(folder / "pot", 2, seed=3).iterdir()]
    rows = read_class_folder(make_class_folder(folder / "class", 3))
    settings = SampleSettings(
        seed=3, size=64, latent_size=16, latent_channels=4, num_train_timesteps=1000, center_crop=False, hflip=True,
        augment=True,
    )  # fmt: skip
    samples = TrainingSamples(photos, rows, settings)
    return collate([samples[position, True] for position in range(5)])


def plain_loss_and_gradients(model, batch, freeze_model):
    """The method as the reference writes it: full embedding table, diffusers' processors, masks of ones and zeros."""
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet").requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder").float()
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    tokenizer.add_tokens([modifier for modifier, _ in PAIRS])
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    for modifier, initializer in PAIRS:
        ids = tokenizer.convert_tokens_to_ids([modifier, initializer + "</w>"])
        table.data[ids[0]] = table.data[ids[1]]
    processors, state = {}, unet.state_dict()
    for name in unet.attn_processors:
        cross = "attn2" in name
        path = name.removesuffix(".processor")
        out_features, in_features = state[f"{path}.to_k.weight"].shape
        processor = CustomDiffusionAttnProcessor2_0(
            train_kv=cross, train_q_out=cross and freeze_model == "crossattn", hidden_size=out_features,
            cross_attention_dim=in_features,
        )  # fmt: skip
        names = {n: n.replace("_custom_diffusion", "") for n in processor.state_dict()}
        processor.load_state_dict({n: state[f"{path}.{own}"] for n, own in names.items()})
        processors[name] = processor
    unet.set_attn_processor(dict(processors))

    posterior = vae.encode(batch["pixel_values"]).latent_dist
    latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    ids = tokenizer(batch["prompts"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    pred = unet(noisy, batch["timesteps"], text_encoder(ids)[0]).sample
    target = batch["noise"]
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, batch["noise"], batch["timesteps"])
    (pred, pred_prior), (target, target_prior) = pred.chunk(2), target.chunk(2)
    instance = ((pred - target) ** 2 * batch["mask"]).sum([1, 2, 3]) / batch["mask"].sum([1, 2, 3])
    loss = instance.mean() + PRIOR_LOSS_WEIGHT * ((pred_prior - target_prior) ** 2).mean()
    loss.backward()
    gradients = {f"{path}.{n}": p.grad for path, module in processors.items() for n, p in module.named_parameters()}
    rows = table.grad[tokenizer.convert_tokens_to_ids([modifier for modifier, _ in PAIRS])]
    return loss, gradients, rows


def our_loss_and_gradients(model, batch, freeze_model):
    source = ModelSource(str(model))
    unet, text, vae = load_models(source, torch.float32, torch.device("cpu"))
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    install_trained_projections(unet, freeze_model)
    text.add_words(PAIRS)
    concept_model = ConceptModel(unet, text)
    latents = LatentEncoder(vae, None)(batch)
    noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    pred = concept_model(noisy, batch["timesteps"], batch["prompts"])
    target = prediction_target(scheduler, latents, batch["noise"], batch["timesteps"])
    loss = custom_diffusion_losses(pred, target, batch["mask"], PRIOR_LOSS_WEIGHT)["loss"]
    loss.backward()
    gradients = to_file_keys({name: p.grad for name, p in trained_tensors(unet).items()}, [], None)
    return loss, gradients, text.trained_rows()[0].grad


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])
def test_loss_and_gradients_equal_the_plain_version(request, batch, fixture, freeze_model):
    model = request.getfixturevalue(fixture)
    loss, gradients, rows = our_loss_and_gradients(model, batch, freeze_model)
    plain_loss, plain_gradients, plain_rows = plain_loss_and_gradients(model, batch, freeze_model)
    assert abs(loss - plain_loss) <= 1e-5 * plain_loss
    assert gradients.keys() == plain_gradients.keys()
    for name, plain in plain_gradients.items():
        assert plain.abs().max() > 0
        assert (gradients[name] - plain).abs().max() <= 1e-5 * plain.abs().max(), name
    assert plain_rows.abs().amax(dim=1).min() > 0
    assert (rows - plain_rows).abs().max() <= 1e-5 * plain_rows.abs().max()


def test_masked_loss_by_hand():
    pred = torch.zeros(2, 3, 2, 2)
    target = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 3, 2, 2)
    mask = torch.tensor([[[[1.0, 0], [0, 0]]], [[[1.0, 1], [1, 0]]]])
    # Sample 0: 1 cell of 3 channels of error 1; sample 1: 3 cells of 3 channels of error 4, over 3 cells.
    assert masked_loss(pred, target, mask).item() == pytest.approx((3 / 1 + 36 / 3) / 2)


def test_parts_of_the_loss():
    rng = np.random.default_rng(0)
    pred, target = (torch.from_numpy(rng.standard_normal((4, 4, 2, 2))) for _ in range(2))
    mask = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    losses = custom_diffusion_losses(pred, target, mask, 0.5)
    assert list(losses) == ["loss", "instance_loss", "prior_loss"]  # what the trackers call them
    total, instance, prior = losses.values()
    error = (pred - target).float().numpy() ** 2
    assert instance.item() == pytest.approx(4 * error[:2].mean())
    assert prior.item() == pytest.approx(error[2:].mean())
    assert total.item() == pytest.approx(instance.item() + 0.5 * prior.item())
    alone, instance, prior = custom_diffusion_losses(pred[:2], target[:2], mask, 0.5).values()
    assert (alone.item(), prior.item()) == (instance.item(), 0)
