"""Runs that are stopped by signals, SIGKILL, full disks or numbers that are none, and then go on as if nothing had been."""

import os
import re
import resource
import signal
import subprocess
import time

import launch
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from custom_diffusion.training import reports as step_reports


@pytest.fixture(scope="module")
def arguments(run_arguments):
    """A run whose course has every kind of memory: schedule, accumulation, optimizer; with a checkpoint at each step."""
    changes = {
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "max_train_steps": 6,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "report_to": "tensorboard",
    }
    return run_arguments | changes


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    """The output folder of the run that nothing stops, and how many seconds its training took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = launch.Run(launch.FORKED, arguments | {"output_dir": folder / "out"}, folder / "log")
    run.wait_for(lambda: "Steps" in run.output)
    start = time.monotonic()
    run.ok()
    return folder / "out", time.monotonic() - start


def steps_done(run):
    _, training, after = run.output.rpartition("Training ")
    return max(map(int, re.findall(r"(\d+)/\d+ \[", after)), default=0) if training else 0


def checkpoints(output_dir):
    return sorted(path.name for path in output_dir.glob("checkpoint-*"))


def resume(arguments, log, **changes):
    run = launch.Run(launch.FORKED, arguments | {"resume_from_checkpoint": "latest"} | changes, log)
    return run.ok()


def group_is_empty(process_id, seconds=15):
    """Whether no process of the group is left; DataLoader workers notice within 5 seconds that they are alone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        listing = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in listing.splitlines()]
        if not any(int(group) == process_id and not state.startswith("Z") for group, state in rows):
            return True
        time.sleep(0.1)
    return False


# Signals


@pytest.mark.parametrize(
    ("number", "status", "command"),
    [
        (signal.SIGTERM, 143, launch.PLAIN),
        (signal.SIGINT, 130, launch.FORKED),
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_ends_the_run_after_a_checkpoint(
    number, status, command, arguments, uninterrupted, tmp_path, trained_difference
):
    stopped = arguments | {"output_dir": tmp_path / "out", "checkpointing_steps": 100, "dataloader_num_workers": 1}
    run = launch.Run(command, stopped, tmp_path / "log")
    run.wait_for(lambda: steps_done(run) >= 2)
    os.killpg(run.process.pid, number)  # a terminal's Ctrl-C, and some schedulers' SIGTERM, reach the whole group
    assert run.wait() == status, run.output
    (name,) = checkpoints(tmp_path / "out")
    (message,) = run.messages
    assert name in message
    assert "--resume_from_checkpoint latest" in message
    assert "Traceback" not in run.output
    assert group_is_empty(run.process.pid)

    resume(stopped, tmp_path / "log2", dataloader_num_workers=0)
    assert trained_difference(uninterrupted[0], tmp_path / "out") == 0


def test_a_second_ctrl_c_stops_at_once(arguments, tmp_path):
    slow = arguments | {
        "output_dir": tmp_path / "out",
        "gradient_accumulation_steps": 10000,
        "dataloader_num_workers": 1,
    }
    run = launch.Run(launch.FORKED, slow, tmp_path / "log")
    run.wait_for(lambda: "Steps" in run.output)
    run.send(signal.SIGINT)
    time.sleep(1)
    assert run.alive()
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert checkpoints(tmp_path / "out") == []
    assert group_is_empty(run.process.pid)


def test_sigterm_to_the_launcher_reaches_the_run(arguments, tmp_path):
    endless = arguments | {"output_dir": tmp_path / "out", "max_train_steps": 10000, "checkpointing_steps": 10000}
    run = launch.Run(launch.ACCELERATE, endless, tmp_path / "log")
    run.wait_for(lambda: steps_done(run) >= 1)
    run.send(signal.SIGTERM)
    assert run.wait() in (143, -signal.SIGTERM)
    assert group_is_empty(run.process.pid, seconds=60)
    assert len(checkpoints(tmp_path / "out")) == 1
    assert len(run.messages) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("command", [launch.ACCELERATE, launch.torchrun(2)], ids=["accelerate", "torchrun"])
def test_no_launcher_leaves_a_run_behind(number, command, arguments, tmp_path):
    endless = arguments | {"output_dir": tmp_path / "out", "max_train_steps": 10000, "checkpointing_steps": 10000}
    run = launch.Run(command, endless, tmp_path / "log")
    run.wait_for(lambda: steps_done(run) >= 1)
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)
    else:
        run.send(number)
    run.wait()
    deadline = time.monotonic() + 60
    while str(tmp_path / "out") in _command_lines() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert str(tmp_path / "out") not in _command_lines()
    assert len(checkpoints(tmp_path / "out")) == 1
    assert len(run.messages) == 1


def _command_lines():
    return subprocess.run(["ps", "-eww", "-o", "args="], capture_output=True, text=True, check=True).stdout


def test_a_signal_to_one_process_stops_all_of_them(arguments, tmp_path):
    endless = arguments | {"output_dir": tmp_path / "out", "max_train_steps": 10000, "checkpointing_steps": 10000}
    runs = launch.run_group(2, endless, tmp_path / "log")
    runs[0].wait_for(lambda: steps_done(runs[0]) >= 1)
    runs[1].send(signal.SIGTERM)
    assert [run.wait() for run in runs] == [143, 143]
    assert len(checkpoints(tmp_path / "out")) == 1
    assert [len(run.messages) for run in runs] == [1, 0]


def test_a_signal_while_class_images_are_drawn_keeps_them(run_arguments, tmp_path):
    changes = {"real_prior": False, "num_class_images": 500, "sample_batch_size": 1}
    folders = {"class_data_dir": tmp_path / "class", "output_dir": tmp_path / "out"}
    run = launch.Run(launch.FORKED, run_arguments | changes | folders, tmp_path / "log")
    run.wait_for(lambda: len(list((tmp_path / "class").glob("*.jpg"))) >= 1)
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    assert len(run.messages) == 1
    assert {path.suffix for path in (tmp_path / "class").iterdir()} == {".jpg"}
    assert not (tmp_path / "out").exists()


# SIGKILL


def kill_and_resume(seed, arguments, uninterrupted, folder):
    """Kill a run up to three times at random moments, resume it with other numbers of workers; return its output folder."""
    rng = np.random.default_rng(seed)
    arguments = arguments | {"output_dir": folder / "out", "resume_from_checkpoint": "latest"}
    for attempt in range(3):
        arguments["dataloader_num_workers"] = int(rng.integers(3))
        run = launch.Run(launch.FORKED, arguments, folder / f"log{attempt}")
        run.wait_for(lambda run=run: "Steps" in run.output)
        time.sleep(rng.uniform(0, uninterrupted[1]))
        killed = run.alive()
        if killed:
            run.send(signal.SIGKILL)
        assert run.wait() in ((-signal.SIGKILL, 0) if killed else (0,)), run.output
        assert group_is_empty(run.process.pid)
    resume(arguments, folder / "last", dataloader_num_workers=int(rng.integers(3)))
    return folder / "out"


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_killed_at_random_and_resumed_nothing_differs(seed, arguments, uninterrupted, tmp_path, trained_difference):
    output_dir = kill_and_resume(seed, arguments, uninterrupted, tmp_path)
    assert trained_difference(uninterrupted[0], output_dir) == 0
    assert len(checkpoints(output_dir)) == 2
    assert not list(output_dir.glob(".*")), "left over by the killed run"


@pytest.mark.parametrize(
    ("precision", "fixture"),
    [
        ("no", "tiny_xl_model"),
        ("no", "tiny_inpainting_model"),
        pytest.param("fp16", "tiny_model", marks=pytest.mark.slow),
        pytest.param("bf16", "tiny_model", marks=pytest.mark.slow),
        pytest.param("bf16", "tiny_xl_model", marks=pytest.mark.slow),
    ],
)
def test_other_precisions_and_families_resume_exactly(
    request, precision, fixture, arguments, tmp_path, trained_difference
):
    model = request.getfixturevalue(fixture)
    arguments = arguments | {"mixed_precision": precision, "pretrained_model_name_or_path": model}
    arguments |= {"output_dir": tmp_path / "out"}
    launch.Run(launch.FORKED, arguments | {"output_dir": tmp_path / "whole"}, tmp_path / "log").ok()
    run = launch.Run(launch.FORKED, arguments, tmp_path / "log1")
    run.wait_for(lambda: "checkpoint-3" in checkpoints(tmp_path / "out"))
    run.send(signal.SIGKILL)
    run.wait()
    resume(arguments, tmp_path / "log2")
    assert trained_difference(tmp_path / "whole", tmp_path / "out") == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_two_processes_killed_and_resumed(seed, arguments, tmp_path, trained_difference):
    rng = np.random.default_rng(seed)
    whole = arguments | {"output_dir": tmp_path / "whole"}
    for run in launch.run_group(2, whole, tmp_path / "log"):
        run.ok()
    arguments = arguments | {"output_dir": tmp_path / "out", "resume_from_checkpoint": "latest"}
    runs = launch.run_group(2, arguments, tmp_path / "log1")
    step = rng.integers(1, 5)
    runs[0].wait_for(lambda: steps_done(runs[0]) >= step)
    for run in runs:
        run.send(signal.SIGKILL)
        run.wait()
    for run in launch.run_group(2, arguments, tmp_path / "log2"):
        run.ok()
    assert trained_difference(tmp_path / "whole", tmp_path / "out") == 0


# Disks and numbers


def test_a_failed_write_leaves_the_last_checkpoint_usable(arguments, uninterrupted, tmp_path, trained_difference):
    arguments = arguments | {"output_dir": tmp_path / "out"}
    run = launch.Run(launch.FORKED, arguments, tmp_path / "log")
    run.wait_for(lambda: "checkpoint-2" in checkpoints(tmp_path / "out"))
    size = (tmp_path / "out" / "checkpoint-2" / "training_state.pt").stat().st_size
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (size - 1, size - 1))  # files can grow no larger
    assert run.wait() == 1, run.output
    (message,) = run.messages
    last = checkpoints(tmp_path / "out")[-1]
    assert "File too large" in message
    assert last in message
    assert "Traceback" not in run.output
    resume(arguments, tmp_path / "log2")
    assert trained_difference(uninterrupted[0], tmp_path / "out") == 0


def test_a_full_disk(arguments, uninterrupted, tmp_path, trained_difference):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        (disk / "ballast").write_bytes(bytes(600_000))
        run = launch.run(launch.FORKED, arguments | {"output_dir": disk / "out"}, tmp_path / "log")
        assert run.status == 1, run.output
        (message,) = run.messages
        assert "No space left on device" in message
        assert checkpoints(disk / "out")[-1] in message
        assert "Traceback" not in run.output
        (disk / "ballast").unlink()
        resume(arguments | {"output_dir": disk / "out"}, tmp_path / "log2")
        assert trained_difference(uninterrupted[0], disk / "out") == 0
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("checkpointing_steps", "message", "last"),
    [
        (1, "the prediction is nan at step 2", "The last good checkpoint is checkpoint-1"),
        (100, "the loss is nan at step 3", "There is no checkpoint to go back to"),
    ],
)
def test_a_run_without_numbers_stops_and_saves_nothing_of_them(checkpointing_steps, message, last, arguments, tmp_path):
    # The first step of the warm-up has a rate of zero, the second one that destroys every weight.
    changes = {"learning_rate": 1e30, "lr_scheduler": "constant_with_warmup", "output_dir": tmp_path / "out"}
    run = launch.run(
        launch.FORKED, arguments | changes | {"checkpointing_steps": checkpointing_steps}, tmp_path / "log"
    )
    assert run.status == 1
    (said,) = run.messages
    assert message in said
    assert last in said
    assert "Traceback" not in run.output
    assert checkpoints(tmp_path / "out") == (["checkpoint-1"] if checkpointing_steps == 1 else [])
    assert not list((tmp_path / "out").glob("*.safetensors"))


# Reports


def test_a_step_that_a_gpu_still_computes_is_not_waited_for(monkeypatch):
    class Event:
        def synchronize(self):
            waited.append(self)

    waited, events = [], [Event(), Event()]
    monkeypatch.setattr(step_reports, "start_copy", lambda values: (values, events[len(handed)]))
    reports, handed = step_reports.StepReports(Accelerator(cpu=True)), []
    for step in (1, 2):
        done = reports.exchange(step, {"loss": torch.tensor(float(step))}, torch.tensor(0.5), 0, lr=1e-3)
        handed.append([(report.step, report.losses["loss"]) for report in done])
    assert handed == [[], [(1, 1.0)]] and waited == events[:1]
    assert [(report.step, report.losses["loss"]) for report in reports.latest()] == [(2, 2.0)] and waited == events
    assert reports.latest() == []
