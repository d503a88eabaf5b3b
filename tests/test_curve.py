"""The losses on a fixed set of images: what they are, where they are shown, and that training does not notice them."""

import copy
import json
import math
import shutil

import launch
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from PIL import Image
from test_invariants import PROMPTS, make_concept_model, time_ids_for
from test_trackers import read_tensorboard
from tiny import make_class_folder, make_pictures

from custom_diffusion.cli.training_flags import build_parser
from custom_diffusion.files import CURVE_IMAGE, CURVE_VALUES, MANIFEST_NAME, STATE_NAME
from custom_diffusion.training import curve as curves
from custom_diffusion.training.checkpoints import _checksum
from custom_diffusion.training.curve import (
    Curve,
    FixedSet,
    Point,
    ShownImage,
    affordable_samples,
    best_step,
    in_turn,
    learned_at,
)
from custom_diffusion.training.curve_report import COLORS, draw_curve
from custom_diffusion.training.latents import LatentEncoder
from custom_diffusion.weights.format import read_weights

LOSSES = ["concept_loss", "prior_loss_held_out"]


@pytest.fixture(scope="module")
def arguments(run_arguments, tmp_path_factory):
    """A run that is measured before its first step and after 2, 4 and 5, with five class images that it does not show."""
    class_data_dir = make_class_folder(tmp_path_factory.mktemp("more") / "class", 12)
    return run_arguments | {"class_data_dir": class_data_dir, "validation_steps": 2, "report_to": "tensorboard"}


@pytest.fixture(scope="module")
def measured(arguments, tmp_path_factory):
    """Its output folder, and what it printed."""
    folder = tmp_path_factory.mktemp("measured")
    changes = {"output_dir": folder / "out", "train_batch_size": 4, "checkpointing_steps": 3}
    return folder / "out", launch.Run(launch.ACCELERATE, arguments | changes, folder / "log").ok()


def read_curve(output_dir):
    return json.loads((output_dir / CURVE_VALUES).read_text())


# What is measured


def test_every_sample_is_measured_as_its_own_objective(any_model):
    """Ten samples of three photos and of two class images, each by itself, against the sum over shared chunks."""
    model, _, vae = make_concept_model(any_model)
    scheduler = DDPMScheduler.from_pretrained(any_model, subfolder="scheduler")
    pixels = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = [ShownImage(*one) for one in zip(pixels, [*PROMPTS, PROMPTS[0]], time_ids_for(range(5)))]
    sets = images[:3], images[3:]
    point = FixedSet(Accelerator(cpu=True), scheduler, LatentEncoder(vae, None), *sets, 10).measure(model, 7)

    with torch.no_grad():
        for number, found in enumerate((point.concept, point.prior)):
            errors = []
            for index in range(10):
                image, prompt, time_ids = sets[number][index % len(sets[number])]
                latents = vae.encode(image[None]).latent_dist.mean * vae.config.scaling_factor
                noise, timestep = (
                    curves._noise(number, index, latents.shape[1:])[None],
                    torch.tensor([index * 100 + 50]),
                )
                predicted = model(scheduler.add_noise(latents, noise, timestep), timestep, [prompt], time_ids[None])
                errors.append((predicted - noise).square().mean().item())
            assert found == pytest.approx(np.mean(errors), rel=1e-5)
            assert np.std(errors) > 1e-4
    assert (point.step, model.training) == (7, True)


@pytest.mark.parametrize(
    ("batch_size", "prior", "samples"), [(4, False, 16), (4, True, 16), (2, True, 8), (1, True, 4)]
)
def test_measuring_costs_less_than_a_twentieth_of_training(batch_size, prior, samples):
    """The default batch size, with and without prior preservation, and those of the guide, for 250 steps."""
    every = build_parser().get_default("validation_steps")
    num_sets = images_per_sample = 2 if prior else 1
    images_per_step = batch_size * images_per_sample
    assert affordable_samples(images_per_step, every, num_sets) == samples
    assert samples * num_sets * (250 // every + 1) <= 0.05 * 2 * images_per_step * 250
    assert affordable_samples(images_per_step, 1, num_sets) == 4  # the least that says anything
    assert affordable_samples(images_per_step, 100000, num_sets) == 80


def test_concepts_take_turns():
    assert in_turn([["a", "b", "c"], ["x"], ["p", "q"]]) == ["a", "x", "p", "b", "q", "c"]


# Where it is shown


def test_trackers_bar_and_files_have_both_losses(measured):
    output_dir, output = measured
    curve = read_curve(output_dir)
    assert [point["step"] for point in curve["points"]] == [0, 2, 4, 5]
    events = read_tensorboard(output_dir)
    for name in LOSSES:
        values = [(point["step"], pytest.approx(point[name])) for point in curve["points"]]
        assert [(event.step, event.value) for event in events.Scalars(name)] == values
        assert len({point[name] for point in curve["points"]}) == 4
        assert f"{name}={curve['points'][2][name]:.4f}" in output
    assert curve["points"][-1]["concept_loss"] < curve["points"][0]["concept_loss"]
    with Image.open(output_dir / CURVE_IMAGE) as image:
        assert image.size == (720, 400)


def test_two_processes_measure_what_one_does(arguments, measured, tmp_path):
    one = read_curve(measured[0])["points"]
    for run in launch.run_group(2, arguments | {"output_dir": tmp_path / "out"}, tmp_path / "log"):
        run.ok()
    two = read_curve(tmp_path / "out")["points"]
    assert two[0] == one[0]  # bit for bit, as nothing was trained yet
    assert [point["step"] for point in two] == [0, 2, 4, 5]
    for name in LOSSES:
        assert [point[name] for point in two] == pytest.approx([point[name] for point in one], rel=1e-5)


def near(image, color):
    """(N, 2) rows and columns of the pixels that are nearly of this colour."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere(np.abs(np.asarray(image).astype(int) - wanted).max(axis=-1) < 40)


def test_the_image_shows_both_losses_and_the_marks():
    points = [Point(step, 0.2 - step / 1000, 0.1 + step / 2000) for step in range(0, 101, 10)]
    image = draw_curve(points, {"learned": 40, "best": None})
    for color, falls in zip(COLORS.values(), (True, False)):
        pixels = near(image, color)
        pixels = pixels[pixels[:, 0] > 50]  # below the legend
        left, right = (pixels[pixels[:, 1] == column][:, 0].mean() for column in pixels[:, 1][[0, 0]] * 0 + [70, 690])
        assert (left < right) == falls  # rows count downwards
    marked = np.asarray(draw_curve(points, {"learned": 40, "best": 90})) != np.asarray(image)
    assert marked.any()
    assert len(near(draw_curve([Point(0, 0.2, None)], {}), COLORS["concept_loss"])) > 20
    draw_curve([Point(0, math.nan, math.inf)], {"learned": None})


# Training does not notice


def without_measuring():
    curves.FixedSet.measure = lambda self, model, step: Point(step, 1.0, None)


@pytest.mark.parametrize("cache_latents", [False, True])
def test_training_is_the_same_bit_for_bit_without_it(cache_latents, arguments, tmp_path, trained_difference):
    changes = {"validation_steps": 1, "cache_latents": cache_latents, "dataloader_num_workers": 1}
    for name, change in (("with", None), ("without", without_measuring)):
        run = arguments | changes | {"output_dir": tmp_path / name}
        launch.Run(launch.FORKED, run, tmp_path / f"{name}.log", changed_by=change).ok()
    assert trained_difference(tmp_path / "with", tmp_path / "without") == 0
    losses = [
        [event.value for event in read_tensorboard(tmp_path / name).Scalars("loss")] for name in ("with", "without")
    ]
    assert losses[0] == losses[1]
    assert "prior_loss_held_out" in read_curve(tmp_path / "with")["points"][0]
    assert read_curve(tmp_path / "without")["points"][0] == {"step": 0, "concept_loss": 1.0}


# Resuming


def test_a_killed_run_has_the_whole_curve_when_it_was_resumed(arguments, measured, tmp_path):
    changes = arguments | {"output_dir": tmp_path / "out", "train_batch_size": 4, "checkpointing_steps": 3}
    killed = launch.Run(launch.FORKED, changes, tmp_path / "log")
    killed.wait_for((tmp_path / "out/checkpoint-3").exists)
    killed.kill_group()
    killed.wait()
    assert not (tmp_path / "out" / CURVE_VALUES).exists()
    changes |= {"resume_from_checkpoint": "latest", "validation_steps": 2, "checkpointing_steps": 100}
    launch.Run(launch.FORKED, changes, tmp_path / "log2").ok()
    assert read_curve(tmp_path / "out") == read_curve(measured[0])
    again = launch.Run(launch.FORKED, changes | {"resume_from_checkpoint": "checkpoint-3"}, tmp_path / "log3").ok()
    assert "Resuming from checkpoint-3" in again
    assert read_curve(tmp_path / "out") == read_curve(measured[0])


def test_a_checkpoint_without_a_curve_begins_one(arguments, measured, tmp_path):
    path = shutil.copytree(measured[0] / "checkpoint-3", tmp_path / "out/checkpoint-3")
    state = torch.load(path / STATE_NAME, weights_only=True)
    del state["curve"]
    torch.save(state, path / STATE_NAME)
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    manifest["files"][STATE_NAME] = _checksum(path / STATE_NAME)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))
    changes = {"output_dir": tmp_path / "out", "train_batch_size": 4, "resume_from_checkpoint": "latest"}
    launch.Run(launch.FORKED, arguments | changes, tmp_path / "log").ok()
    points = read_curve(tmp_path / "out")["points"]
    assert [point["step"] for point in points] == [3, 4, 5]
    assert points[1:] == read_curve(measured[0])["points"][2:]


def test_a_curve_that_goes_on_keeps_its_samples():
    curve, resumed = Curve(), Curve()
    curve.points, curve.num_samples = [Point(0, 0.25, None), Point(50, 0.125, 0.5)], 12
    resumed.load_state_dict(copy.deepcopy(curve.state_dict()))
    assert (resumed.points, resumed.num_samples) == (curve.points, 12)
    assert resumed.latest() == {"concept_loss": 0.125, "prior_loss_held_out": 0.5}


# The best


SCRIPTED = {0: 0.5, 1: 0.4, 2: 0.2, 3: 0.3, 4: 0.25, 5: 0.3}


def scripted():
    curves.FixedSet.measure = lambda self, model, step: Point(step, SCRIPTED[step], None)


def test_the_best_checkpoint_is_kept_beside_the_last(arguments, tmp_path, trained_difference):
    changes = {"output_dir": tmp_path / "out", "validation_steps": 1, "checkpointing_steps": 3, "keep_best": True}
    changes = arguments | changes | {"checkpoints_total_limit": 1}
    launch.Run(launch.FORKED, changes, tmp_path / "log", changed_by=scripted).ok()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert read_curve(tmp_path / "out")["best"] == 2
    two_steps = changes | {"output_dir": tmp_path / "two", "max_train_steps": 2, "keep_best": False}
    launch.Run(launch.FORKED, two_steps, tmp_path / "log2", changed_by=scripted).ok()
    assert trained_difference(tmp_path / "out/checkpoint-2", tmp_path / "two") == 0
    resumed = changes | {"resume_from_checkpoint": "latest"}
    assert "from checkpoint-3" in launch.Run(launch.FORKED, resumed, tmp_path / "log3", changed_by=scripted).ok()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_the_best_is_low_in_both_losses_after_the_first_step():
    points = [Point(0, 0.0, 0.0), Point(1, 0.5, 0.1), Point(2, 0.3, 0.2), Point(3, 0.2, 0.4), Point(4, math.nan, 0.0)]
    assert best_step(points, 1.0) == 2
    assert best_step(points, 0.1) == 3
    assert best_step(points, 10.0) == 1
    assert best_step([Point(1, 0.1, None), Point(2, 0.3, 0.2), Point(3, 0.3, 0.1)], 1.0) == 3
    assert best_step([Point(1, 0.1, None), Point(2, 0.3, None)], 1.0) == 1
    assert best_step(points[:1], 1.0) is None


# Class images


def test_without_more_class_images_than_are_shown_the_prior_is_not_measured(run_arguments, tmp_path):
    changes = {"output_dir": tmp_path / "out", "max_train_steps": 1}
    output = launch.Run(launch.FORKED, run_arguments | changes, tmp_path / "log").ok()
    assert "No class images beyond --num_class_images 7" in output
    assert [set(point) for point in read_curve(tmp_path / "out")["points"]] == [{"step", "concept_loss"}] * 2


def test_a_damaged_class_image_that_is_not_needed_is_passed_over(arguments, tmp_path):
    """Two concepts of one class: its images count once."""
    class_data_dir = make_class_folder(tmp_path / "class", 9)
    (class_data_dir / "images" / "7.jpg").write_bytes(b"never an image")
    photos = [arguments["instance_data_dir"], make_pictures(tmp_path / "pot", 2, size=(50, 80))]
    concepts = [
        {"instance_prompt": f"photo of a <new{number}> cat", "instance_data_dir": str(folder), "class_prompt": "cat",
         "class_data_dir": str(class_data_dir)}
        for number, folder in enumerate(photos, start=1)
    ]  # fmt: skip
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    changes = {"concepts_list": tmp_path / "concepts.json", "modifier_token": "<new1>+<new2>", "max_train_steps": 1}
    output = launch.Run(launch.FORKED, arguments | changes | {"output_dir": tmp_path / "out"}, tmp_path / "log").ok()
    (warning,) = [line for line in output.splitlines() if "not needed for training is passed over" in line]
    assert "images/7.jpg" in warning
    assert "prior_loss_held_out" in read_curve(tmp_path / "out")["points"][0]


# Whether anything is still learned


def curve_of(losses, every=50):
    return [Point(every * index, loss, None) for index, loss in enumerate(losses)]


def test_a_loss_that_lies_still_has_been_learned():
    falling = [0.2, 0.18, 0.16, 0.14, 0.12, 0.10, 0.08, 0.06]
    assert learned_at(curve_of(falling)) is None
    still = curve_of([*falling, *[0.06] * 8])
    step = learned_at(still)
    assert 350 < step < 750
    assert (
        learned_at(still[: still.index(next(p for p in still if p.step == step)) + 1]) == step
    )  # known when it happens
    assert learned_at(curve_of([0.2] * 20)) is None  # nothing was learned
    assert learned_at(curve_of([0.2, *[0.3] * 20])) is None
    assert learned_at([]) is None


FALLS_THEN_LIES = [0.5, 0.4, 0.3, *[0.2] * 20]  # means of three points are compared


def falling_then_lying():
    curves.FixedSet.measure = lambda self, model, step: Point(step, FALLS_THEN_LIES[step], None)


def test_the_curve_says_when_it_was_learned(arguments, tmp_path):
    changes = {"validation_steps": 1, "max_train_steps": 12, "output_dir": tmp_path / "out"}
    launch.Run(launch.FORKED, arguments | changes, tmp_path / "log", changed_by=falling_then_lying).ok()
    assert read_curve(tmp_path / "out")["learned"] == 8
    assert read_weights(tmp_path / "out").config["steps"] == 12
