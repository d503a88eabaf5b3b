"""--mixed_precision fp16: steps whose scaled gradients overflow are skipped, do not count, and are made up for."""

import math

import launch
import pytest
import torch
from accelerate import Accelerator

from custom_diffusion.files import list_checkpoints
from custom_diffusion.training.checkpoints import read_checkpoint

INITIAL_SCALE = 2.0**22  # overflows on the tiny model
NUM_STEPS = 6


def scale_gradients():
    """Give the run a gradient scaler, as accelerate does on GPUs only. It tries a larger scale after every second step."""
    make = Accelerator.__init__

    def make_with_scaler(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=INITIAL_SCALE, growth_interval=2)

    Accelerator.__init__ = make_with_scaler


def never_finite():
    """As above, on a model whose gradients are not finite whatever they are scaled by."""
    scale_gradients()
    spoil_gradients()


def spoil_gradients():
    backward = Accelerator.backward
    Accelerator.backward = lambda self, loss: backward(self, loss * math.nan)


@pytest.fixture(scope="module")
def arguments(run_arguments):
    return run_arguments | {
        "mixed_precision": "fp16",
        "freeze_model": "crossattn",
        "lr_scheduler": "linear",
        "train_batch_size": 1,
        "checkpointing_steps": 1,
        "max_train_steps": NUM_STEPS,
    }


def train(num_processes, arguments, log):
    """The output of the run, of one process or several."""
    if num_processes == 1:
        return launch.Run(launch.FORKED, arguments, log, changed_by=scale_gradients).ok()
    runs = launch.run_group(num_processes, arguments, log, changed_by=scale_gradients)
    outputs = [run.ok() for run in runs]
    return outputs[0]


@pytest.mark.parametrize(
    ("changes", "num_processes"),
    [
        ({}, 1),
        ({"cache_latents": True, "augmentations_per_image": 2, "dataloader_num_workers": 1}, 1),
        ({"gradient_accumulation_steps": 2}, 1),
        ({}, 2),
    ],
    ids=["plain", "cached latents", "accumulation", "two processes"],
)
def test_skipped_steps_do_not_count(changes, num_processes, arguments, tmp_path, trained_difference):
    arguments = arguments | changes
    samples_per_step = num_processes * arguments.get("gradient_accumulation_steps", 1)
    train(num_processes, arguments | {"output_dir": tmp_path / "out"}, tmp_path / "log")
    checkpoints = [read_checkpoint(path) for path in list_checkpoints(tmp_path / "out")]
    assert [checkpoint.step for checkpoint in checkpoints] == [*range(1, NUM_STEPS + 1)]
    skipped = [checkpoint.position // samples_per_step - checkpoint.step for checkpoint in checkpoints]
    for checkpoint in checkpoints:
        assert checkpoint.state["lr_scheduler"]["last_epoch"] == checkpoint.step
        assert {state["step"].item() for state in checkpoint.state["optimizer"]["state"].values()} == {checkpoint.step}
    assert checkpoints[0].state["scaler"]["scale"] == INITIAL_SCALE / 2 ** skipped[0]
    assert skipped[-1] > skipped[0] > 0, "no step was skipped later on"

    # Resume before such a later skip
    last_before = max(step for step, count in enumerate(skipped, start=1) if count < skipped[-1])
    resumed = arguments | {
        "output_dir": tmp_path / "resumed",
        "resume_from_checkpoint": tmp_path / f"out/checkpoint-{last_before}",
    }
    assert "different run" not in train(num_processes, resumed, tmp_path / "log2")
    assert trained_difference(tmp_path / "out", tmp_path / "resumed") == 0
    last = read_checkpoint(tmp_path / f"resumed/checkpoint-{NUM_STEPS}")
    assert (last.position, last.state["scaler"]) == (checkpoints[-1].position, checkpoints[-1].state["scaler"])


def test_without_scaling_the_gradient_is_named_if_only_it_is_not_finite(run_arguments, tmp_path):
    arguments = run_arguments | {"output_dir": tmp_path / "out"}
    run = launch.run(launch.FORKED, arguments, tmp_path / "log", changed_by=spoil_gradients)
    assert run.status == 1
    (message,) = run.messages
    assert "the gradient is nan at step 1; nothing of it was saved" in message
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_gradients_that_are_never_finite_end_the_run_in_one_line(num_processes, arguments, tmp_path):
    runs = launch.run_group(
        num_processes, arguments | {"output_dir": tmp_path / "out"}, tmp_path / "log", changed_by=never_finite
    )
    assert [run.wait() for run in runs] == [1] * num_processes
    (message,) = runs[0].messages
    assert "the gradient is nan at step 1; nothing of it was saved" in message
    assert all("Traceback" not in run.output for run in runs)
    assert not list_checkpoints(tmp_path / "out")
