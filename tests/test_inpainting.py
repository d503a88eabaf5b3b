"""Inpainting models: holes drawn for each sample, what the UNet is given, and the whole run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_data import SETTINGS
from tiny import make_class_folder, make_pictures

from custom_diffusion.training.holes import draw_hole
from custom_diffusion.training.samples import BatchPlan, TrainingSamples, collate

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
