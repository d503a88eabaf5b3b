"""Scores, on features whose answers are worked out by hand and on small random models."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_clip, make_dino, make_pictures
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from custom_diffusion.errors import InputError
from custom_diffusion.evaluation.metrics import (
    Scorer,
    clip_scores,
    image_cosines,
    kernel_distance,
    load_clip,
    load_dino,
    text_cosines,
)

CPU = torch.device("cpu")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return make_clip(folder / "clip"), make_dino(folder / "dino")


# By hand


def test_text_alignment_by_hand():
    images = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [5.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    cosines = text_cosines(images, texts)
    assert cosines.tolist() == pytest.approx([1, 0, -1, 0.5**0.5])
    assert clip_scores(cosines).tolist() == pytest.approx([2.5, 0, 0, 2.5 * 0.5**0.5])


def test_image_alignment_by_hand_is_the_mean_over_all_pairs():
    images = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    photos = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    root = 0.5**0.5
    assert image_cosines(images, photos).tolist() == pytest.approx([0.5, root, -0.5])
    assert image_cosines(images, photos).mean().item() == pytest.approx((1 + 0 + root + root + 0 - 1) / 6)


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_kernel_distance_by_hand(scale):
    """The kernel is (cos + 1)^3: 1 between the real ones, 0 between the drawn ones, 8, 0, 1 and 1 across."""
    real, drawn = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    mean, deviation = kernel_distance(scale * real, drawn)
    assert mean == pytest.approx(1000 * (1 + 0 - 2 * (8 + 0 + 1 + 1) / 4))
    assert deviation == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_the_same_each_time_and_leaves_the_random_state_alone():
    real, drawn = torch.randn(40, 8), torch.randn(9, 8) + 1
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = kernel_distance(real, drawn)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert kernel_distance(real, drawn) == first
    assert first[0] > 10 * abs(kernel_distance(real[:20], real[20:])[0])
    with pytest.raises(ValueError, match="two images of each kind"):
        kernel_distance(real, drawn[:1])


# Preprocessing, step by step with Pillow


def preprocessed(image, resize, crop, mean, std):
    """Shorter side to `resize`, bicubic; a crop from the middle; (3, crop, crop)."""
    short = min(image.size)
    width, height = (int(resize * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - crop) // 2, (height - crop) // 2
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop))).astype(np.float64) / 255
    return ((pixels - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(90, 70), (64, 101), (20, 20)])
def test_preprocessing_is_that_of_the_authors(models, tmp_path, size):
    make_pictures(tmp_path, 1, size, suffix=".png")
    image = Image.open(tmp_path / "0.png")
    clip, dino = load_clip(str(models[0]), CPU)[0], load_dino(str(models[1]), CPU)
    pixels = clip.processor([image], return_tensors="pt")["pixel_values"][0].numpy()
    assert np.abs(pixels - preprocessed(image, 32, 32, CLIP_MEAN, CLIP_STD)).max() < 1e-5
    pixels = dino.processor([image], return_tensors="pt")["pixel_values"][0].numpy()
    assert np.abs(pixels - preprocessed(image, 28 * 256 / 224, 28, IMAGENET_MEAN, IMAGENET_STD)).max() < 1e-5


# Small models


def features_by_hand(files, resize, crop, mean, std):
    """What a model is given."""
    images = [preprocessed(Image.open(file).convert("RGB"), resize, crop, mean, std) for file in files]
    return torch.tensor(np.stack(images), dtype=torch.float32)


def cosine_of_each_pair(images, photos):
    return torch.stack([torch.cosine_similarity(image[None], photos) for image in images]).mean(dim=1)


@torch.no_grad()
def test_scores_are_those_of_the_models_themselves(models, tmp_path):
    photos = sorted(make_pictures(tmp_path / "photos", 3, suffix=".png").iterdir())
    images = sorted(make_pictures(tmp_path / "images", 40, seed=5, suffix=".png").iterdir())  # more than one batch
    texts = [
        "photo of a cat",
        "a pot in the bucket sitting sitting sitting sitting sitting sitting sitting sitting sitting",
    ] * 20
    clip, text, dino = *load_clip(str(models[0]), CPU), load_dino(str(models[1]), CPU)
    scorer = Scorer(
        clip, text, dino, clip(photos, "--photos"), dino(photos, "--photos"), clip(photos, "--class_images")
    )
    scores = scorer.image_scores(images, texts)

    whole = CLIPModel.from_pretrained(models[0]).eval()
    tokens = CLIPTokenizer.from_pretrained(models[0])(
        texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    seen = features_by_hand(images, 32, 32, CLIP_MEAN, CLIP_STD)
    output = whole(**tokens, pixel_values=seen)
    cosines = (output.logits_per_image / whole.logit_scale.exp()).diagonal()
    assert [one["clip_t_cosine"] for one in scores] == pytest.approx(cosines.tolist(), abs=1e-5)
    assert [one["clip_t"] for one in scores] == pytest.approx((2.5 * cosines.clamp(min=0)).tolist(), abs=1e-5)
    of_photos = whole(**tokens, pixel_values=features_by_hand(photos, 32, 32, CLIP_MEAN, CLIP_STD)).image_embeds
    expected = cosine_of_each_pair(output.image_embeds, of_photos)
    assert [one["clip_i"] for one in scores] == pytest.approx(expected.tolist(), abs=1e-5)

    vit = ViTModel.from_pretrained(models[1], add_pooling_layer=False).eval()
    settings = (28 * 256 / 224, 28, IMAGENET_MEAN, IMAGENET_STD)
    vectors = [vit(features_by_hand(files, *settings)).last_hidden_state[:, 0] for files in (images, photos)]
    expected = cosine_of_each_pair(*vectors)
    assert [one["dino"] for one in scores] == pytest.approx(expected.tolist(), abs=1e-5)

    distance = scorer.forgetting(images)
    expected = kernel_distance(of_photos, output.image_embeds)
    assert (distance["kid_clip"], distance["kid_clip_deviation"]) == pytest.approx(expected, abs=0.05)
    assert distance["num_class_images"] == 40


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_models_that_lack_weights_are_refused_instead_of_random(kind, tmp_path):
    make, load = {"clip": (make_clip, load_clip), "dino": (make_dino, load_dino)}[kind]
    file = make(tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in sorted(tensors) if name.endswith("weight") and "norm" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"--{kind}_model: .*1 of its weights are missing"):
        load(str(tmp_path / "model"), CPU)


def test_a_model_of_another_kind_is_refused(models):
    for load, path in ((load_clip, models[1]), (load_dino, models[0])):
        with pytest.raises(InputError, match=r"_model: '.*' cannot be loaded as a ") as raised:
            load(str(path), CPU)
        assert "\n" not in str(raised.value)


def test_half_precision_files_are_computed_in_float32(models, tmp_path):
    CLIPModel.from_pretrained(models[0]).half().save_pretrained(tmp_path / "clip")
    CLIPTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path / "clip")
    clip, text = load_clip(str(tmp_path / "clip"), CPU)
    assert {p.dtype for m in (clip, text) for p in m.model.parameters()} == {torch.float32}
