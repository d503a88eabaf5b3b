"""Inpainting models: holes drawn for each sample, what the UNet is given, and the whole run."""

import shutil
from dataclasses import replace

import launch
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from original_layout import save_single_file
from PIL import Image
from test_data import SETTINGS
from tiny import make_class_folder, make_pictures, make_xl_model

from custom_diffusion import generate, load_custom_diffusion, unload_custom_diffusion
from custom_diffusion.errors import InputError
from custom_diffusion.images import find_images
from custom_diffusion.model.inpainting import all_hole, paints_holes
from custom_diffusion.model.loading import load_pipeline, load_vae
from custom_diffusion.model.source import ModelSource, check_model
from custom_diffusion.training.holes import draw_hole
from custom_diffusion.training.latents import LatentEncoder
from custom_diffusion.training.model_card import model_card
from custom_diffusion.training.samples import BatchPlan, TrainingSamples, collate
from custom_diffusion.weights.format import read_weights

HOLES = replace(SETTINGS, inpainting=True)


def drawn(count, size=64):
    return [draw_hole(np.random.default_rng(seed), size)[0] for seed in range(count)]


def bounds(hole):
    rows, columns = hole.any(dim=1).nonzero().flatten(), hole.any(dim=0).nonzero().flatten()
    return rows[0].item(), rows[-1].item() + 1, columns[0].item(), columns[-1].item() + 1


def test_holes_are_rectangles_ellipses_or_everything():
    holes = drawn(400)
    kinds = {"everything": 0, "rectangle": 0, "ellipse": 0}
    for hole in holes:
        top, bottom, left, right = bounds(hole)
        filled = hole[top:bottom, left:right].float().mean().item()
        if hole.all():
            kinds["everything"] += 1
        elif filled == 1:
            kinds["rectangle"] += 1
        else:
            assert filled == pytest.approx(np.pi / 4, abs=0.16)
            kinds["ellipse"] += 1
    assert 70 < kinds["everything"] < 130
    assert min(kinds["rectangle"], kinds["ellipse"]) > 90


def test_holes_have_any_size_at_any_place():
    heights = [bounds(hole)[1] - bounds(hole)[0] for hole in drawn(400) if not hole.all()]
    tops = [bounds(hole)[0] for hole in drawn(400) if not hole.all()]
    assert min(heights) <= 3 and max(heights) >= 62
    assert min(tops) == 0 and max(tops) >= 55
    assert all(hole.any() for hole in drawn(400))


def test_an_ellipse_is_round():
    ellipse = next(hole for hole in drawn(400) if not hole.all() and bounds(hole)[1] - bounds(hole)[0] > 30
                   and hole[tuple(slice(*bounds(hole)[i : i + 2]) for i in (0, 2))].float().mean() < 0.9)  # fmt: skip
    top, bottom, left, right = bounds(ellipse)
    inner = ellipse[top:bottom, left:right]
    assert not inner[0, 0] and not inner[-1, -1] and inner[(bottom - top) // 2].all()
    assert torch.equal(inner, inner.flip(0)) and torch.equal(inner, inner.flip(1))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    data = tmp_path_factory.mktemp("inpainting")
    photos = [(path, "a <new1> cat") for path in sorted(make_pictures(data / "photos", 3).iterdir())]
    class_images = [(path, "a cat") for path in sorted((make_class_folder(data / "class", 2) / "images").iterdir())]
    return {
        inpainting: TrainingSamples(photos, class_images, replace(HOLES, inpainting=inpainting))
        for inpainting in (True, False)
    }


def test_a_hole_follows_from_the_seed_and_the_position(samples):
    one, again, next_one = (samples[True][position, True] for position in (4, 4, 5))
    assert torch.equal(one["holes"], again["holes"]) and torch.equal(one["hole_noise"], again["hole_noise"])
    assert not torch.equal(one["hole_noise"], next_one["hole_noise"])
    assert not torch.equal(one["hole_noise"], one["posterior_noise"])
    assert not torch.equal(one["hole_noise"][0], one["hole_noise"][1])
    assert one["holes"].shape == (2, 1, 64, 64) and one["hole_noise"].shape == (2, 4, 16, 16)


def test_all_else_is_what_other_models_see(samples):
    with_hole, without = samples[True][4, True], samples[False][4, True]
    assert with_hole.keys() - without.keys() == {"holes", "hole_noise"}
    for name in ("pixel_values", "noise", "posterior_noise", "timesteps", "mask"):
        assert torch.equal(with_hole[name], without[name])


def test_a_batch_keeps_holes_beside_their_images(samples):
    plan = next(iter(BatchPlan(0, 1, 2, 1, 0, 1)))
    apart = [samples[True][position, True] for position in plan]
    batch = collate(apart)
    for name in ("holes", "hole_noise", "pixel_values"):
        assert torch.equal(
            batch[name], torch.stack([apart[0][name][0], apart[1][name][0], apart[0][name][1], apart[1][name][1]])
        )
    assert "holes" not in collate([samples[False][position, True] for position in plan])


# The model


@pytest.fixture(scope="module")
def models(tiny_inpainting_model, tmp_path_factory):
    """family -> folder of an inpainting model, and its pipeline."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "sd": (tiny_inpainting_model, StableDiffusionInpaintPipeline),
        "sdxl": (make_xl_model(folder / "sdxl", in_channels=9), StableDiffusionXLInpaintPipeline),
    }


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_inpainting_model_is_told_from_others(family, models, tiny_model):
    shape, _ = check_model(ModelSource(str(models[family][0])))
    other, _ = check_model(ModelSource(str(tiny_model)))
    assert (shape.inpainting, shape.input_channels, shape.latent_channels) == (True, 9, 4)
    assert (other.inpainting, other.input_channels) == (False, 4)


def test_a_single_file_says_itself_what_it_takes(models, tiny_model, tmp_path):
    """Even where a text-to-image model's configuration describes it."""
    file = save_single_file(models["sd"][0], tmp_path / "x.safetensors")
    source = ModelSource(str(file), config_from=str(tiny_model))
    assert check_model(source)[0].inpainting
    assert isinstance(load_pipeline(source, torch.float32), StableDiffusionInpaintPipeline)


def test_what_the_unet_is_given_is_what_the_pipeline_gives_it(models):
    """Mask and masked latents of diffusers' own pipeline, but for the noise of the VAE's posterior."""
    pipe = load_pipeline(ModelSource(str(models["sd"][0])), torch.float32)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    hole = drawn(3)[2][None, None]
    noise = torch.zeros(1, 4, 16, 16)
    given = LatentEncoder(pipe.vae, None).without_holes({"pixel_values": image, "holes": hole, "hole_noise": noise})
    seen = []
    pipe.unet.forward, forward = (
        (lambda sample, *args, **kwargs: seen.append(sample) or forward(sample, *args, **kwargs)),
        pipe.unet.forward,
    )
    pipe.set_progress_bar_config(disable=True)
    mean = pipe.vae.encode(image.masked_fill(hole, 0)).latent_dist.mean * pipe.vae.config.scaling_factor
    pipe("a cat", image=image, mask_image=hole.float(), height=64, width=64, num_inference_steps=1, guidance_scale=1.0,
         masked_image_latents=mean)  # fmt: skip
    assert seen[0].shape == (1, 9, 16, 16)
    assert torch.equal(seen[0][:, 4:5], given[:, :1])
    assert torch.allclose(seen[0][:, 5:], given[:, 1:], atol=1e-5)


def test_the_noise_of_the_masked_image_counts(models):
    vae = load_vae(ModelSource(str(models["sd"][0])), torch.float32, torch.device("cpu"))
    batch = {"pixel_values": torch.zeros(1, 3, 64, 64), "holes": torch.zeros(1, 1, 64, 64, dtype=torch.bool)}
    noise = torch.randn(1, 4, 16, 16)
    given = LatentEncoder(vae, None).without_holes(batch | {"hole_noise": noise})
    plain = LatentEncoder(vae, None)(batch | {"posterior_noise": noise})
    assert torch.equal(given[:, 1:], plain) and not given[:, :1].any()


# Trained


@pytest.fixture(scope="module")
def trained(models, run_arguments, tmp_path_factory):
    """family -> what was trained on it, with generated class images and validation images."""
    made, folder = {}, tmp_path_factory.mktemp("trained")

    def train(family):
        if family not in made:
            arguments = run_arguments | {
                "pretrained_model_name_or_path": models[family][0], "output_dir": folder / family, "real_prior": False,
                "class_data_dir": folder / f"class-{family}", "num_class_images": 2, "sample_batch_size": 2,
                "max_train_steps": 2, "checkpointing_steps": 1, "train_batch_size": 1, "report_to": "none",
                "validation_prompt": "a <new1> cat", "num_validation_images": 1,
            }  # fmt: skip
            launch.run(launch.FORKED, arguments, folder / f"{family}.log").ok()
            made[family] = folder / family, arguments
        return made[family]

    return train


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_run_on_an_inpainting_model(family, models, trained):
    """Trained, read back, drawn; class images too."""
    folder, arguments = trained(family)
    weights = read_weights(folder)
    assert weights.config["inpainting"] and weights.config["steps"] == 2
    assert sorted(path.name for path in (folder / "samples").glob("*.png")) == ["final-0.png", "step-000000-0.png"]
    assert len(find_images(arguments["class_data_dir"])) == 2
    pipe = load_pipeline(ModelSource(str(models[family][0])), torch.float32)
    base = {name: pipe.unet.get_parameter(name).detach().clone() for name in weights.shapes()}
    assert any(not torch.equal(base[name], weights.tensors[name]) for name in base)
    load_custom_diffusion(pipe, weights)
    assert all(torch.equal(pipe.unet.get_parameter(name), weights.tensors[name]) for name in base)
    unload_custom_diffusion(pipe)
    assert all(torch.equal(pipe.unet.get_parameter(name), base[name]) for name in base)


def test_an_interrupted_run_goes_on_with_the_same_holes(trained, trained_difference, tmp_path):
    folder, arguments = trained("sd")
    shutil.copytree(folder / "checkpoint-1", tmp_path / "out" / "checkpoint-1")
    arguments = arguments | {
        "output_dir": tmp_path / "out",
        "resume_from_checkpoint": "latest",
        "validation_prompt": None,
    }
    launch.run(launch.FORKED, arguments, tmp_path / "log").ok()
    assert trained_difference(folder, tmp_path / "out") == 0


def test_an_image_of_the_class_depends_on_its_number_alone(models):
    pipe = load_pipeline(ModelSource(str(models["sd"][0])), torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw(*numbers):
        generators = [torch.Generator().manual_seed(number) for number in numbers]
        options = {"num_inference_steps": 2, "output_type": "pt"} | all_hole(pipe, count=len(numbers))
        return pipe(["a cat"] * len(numbers), generator=generators, **options).images

    assert torch.allclose(draw(1, 2)[1], draw(2)[0], atol=1e-4)


def test_latents_of_holes_are_not_cached(trained, tmp_path):
    _, arguments = trained("sd")
    refused = launch.run(
        launch.FORKED, arguments | {"cache_latents": True, "output_dir": tmp_path / "out"}, tmp_path / "log"
    )
    assert refused.status == 2 and refused.messages[0].startswith(
        "--cache_latents: an inpainting model sees another hole"
    )


@pytest.fixture
def photo_and_mask(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(256, size=(80, 100, 3), dtype=np.uint8))
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (0, 0, 50, 80))
    photo.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def test_generate_paints_into_an_image(trained, photo_and_mask, tmp_path):
    weights, _ = trained("sd")
    photo, mask = photo_and_mask
    options = {"num_inference_steps": 2, "seed": 3}
    generate(weights, "<new1> cat", image=photo, mask=mask, output=tmp_path / "in.png", **options)
    generate(weights, "<new1> cat", output=tmp_path / "all.png", **options)
    assert Image.open(tmp_path / "in.png").size == (100, 80)
    assert Image.open(tmp_path / "all.png").size == (64, 64)


def test_generate_paints_into_no_image_with_another_model(tiny_model, photo_and_mask, tmp_path):
    photo, mask = photo_and_mask
    with pytest.raises(InputError, match="--image: this is no inpainting model"):
        generate(None, "a cat", model=str(tiny_model), image=photo, mask=mask, output=tmp_path / "x.png")


def test_an_image_that_cannot_be_read(models, photo_and_mask, tmp_path):
    (tmp_path / "mask.png").write_text("<html>")
    with pytest.raises(InputError, match=r"--mask: '.*mask.png' cannot be read as an image"):
        generate(None, "a cat", model=str(models["sd"][0]), image=photo_and_mask[0], mask=photo_and_mask[1],
                 output=tmp_path / "x.png")  # fmt: skip


def test_weights_of_a_text_to_image_model_fit_and_the_other_way_round(models, tiny_model, trained):
    """Both kinds have the same cross-attention."""
    pipe = load_pipeline(ModelSource(str(tiny_model)), torch.float32)
    assert not paints_holes(pipe.unet.config) and all_hole(pipe) == {}
    load_custom_diffusion(pipe, trained("sd")[0])


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("Stable Diffusion", "StableDiffusionInpaintPipeline"),
        ("Stable Diffusion XL", "StableDiffusionXLInpaintPipeline"),
    ],
)
def test_the_card_of_an_inpainting_model(family, pipeline):
    config = {"base_model": "me/base", "family": family, "inpainting": True, "modifier_tokens": ["<new1>"]}
    card = model_card("me/cat", config, [])
    assert card.data.pipeline_tag == "image-to-image"
    assert f"from diffusers import {pipeline}" in str(card) and f"pipe = {pipeline}.from_pretrained('me/base'" in str(
        card
    )
    assert "mask_image=load_image(" in str(card)
