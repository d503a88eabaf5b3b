"""Signals before and after training, and what the others do when a process of the run dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest

from custom_diffusion.files import MANIFEST_NAME, STATE_NAME
from custom_diffusion.weights.format import read_weights

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
SOON = 60  # seconds; nothing is waited for, but the machine may be busy


@pytest.fixture(scope="module")
def drawing(run_arguments):
    """A run of one step that draws for many seconds, before the step and after the weights are written."""
    return run_arguments | {"max_train_steps": 1, "validation_prompt": "<new1> cat", "num_validation_images": 5}


def ends_soon(run):
    """The exit status of a run that has no reason to go on."""
    deadline = time.monotonic() + SOON
    while run.alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    if run.alive():
        run.kill_group()
        pytest.fail(f"it goes on:\n{run.output}")
    return run.wait()


def final_images(output_dir):
    return list((output_dir / "samples").glob("final-*"))


# Before training


@SIGNALS
def test_a_signal_while_the_model_is_fetched_ends_the_process(number, run_arguments, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a Hub that takes calls and never answers
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        hub |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_ETAG_TIMEOUT": "200", "HF_HUB_DOWNLOAD_TIMEOUT": "200"}
        fetching = run_arguments | {"pretrained_model_name_or_path": "tester/base", "output_dir": tmp_path / "out"}
        run = launch.Run(launch.PLAIN, fetching, tmp_path / "log", hub)
        silent.settimeout(launch.TIMEOUT)
        connection, _ = silent.accept()
        with connection:
            run.send(number)
            assert ends_soon(run) == -number
    assert "Traceback" not in run.output
    assert not (tmp_path / "out").exists()


@SIGNALS
def test_a_signal_while_a_checkpoint_is_read_ends_the_process(number, run_arguments, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    manifest = {"step": 1, "position": 2, "settings": {}, "files": {STATE_NAME: "0"}}
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest))
    with (checkpoint / STATE_NAME).open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk, and hours to read
    resuming = run_arguments | {"output_dir": tmp_path / "out", "resume_from_checkpoint": "latest"}
    run = launch.Run(launch.FORKED, resuming, tmp_path / "log")
    run.wait_for(lambda: STATE_NAME in open_files(run.process.pid))
    run.send(number)
    assert ends_soon(run) == -number
    assert "Traceback" not in run.output


def open_files(process_id):
    listing = subprocess.run(["ls", "-l", f"/proc/{process_id}/fd"], capture_output=True, text=True, check=False)
    return listing.stdout


def test_a_launcher_that_dies_while_the_script_is_imported_takes_it_along(run_arguments, tmp_path):
    endless = run_arguments | {"output_dir": tmp_path / "out", "max_train_steps": 10000}
    run = launch.Run(launch.ACCELERATE, endless, tmp_path / "log")
    script = []

    def importing():
        listing = subprocess.run(["pgrep", "-P", str(run.process.pid)], capture_output=True, text=True, check=False)
        for process in (f"/proc/{child}" for child in listing.stdout.split()):
            is_script = "accelerate.commands" not in contents(f"{process}/cmdline")  # no longer a copy of the launcher
            if is_script and "libtorch" in contents(f"{process}/maps"):
                script.append(process)
        return script

    run.wait_for(importing)
    assert script
    run.send(signal.SIGTERM)
    run.wait()
    deadline = time.monotonic() + SOON
    while contents(f"{script[0]}/cmdline") and time.monotonic() < deadline:
        time.sleep(0.1)
    left = contents(f"{script[0]}/cmdline")
    run.kill_group()
    assert not left
    assert not (tmp_path / "out").exists()


def contents(file):
    try:
        return Path(file).read_text()
    except OSError:  # the process is gone
        return ""


# After training


@SIGNALS
def test_a_signal_while_the_last_images_are_drawn_ends_at_once_with_the_weights_safe(number, drawing, tmp_path):
    run = launch.Run(launch.FORKED, drawing | {"output_dir": tmp_path / "out"}, tmp_path / "log")
    run.wait_for(lambda: "read them back" in run.output or (tmp_path / "out" / "custom_diffusion_config.json").exists())
    run.send(number)
    assert ends_soon(run) == 128 + number
    (message,) = run.messages
    assert message == f"stopped by a signal; the trained weights are in '{tmp_path / 'out'}'"
    assert "Traceback" not in run.output
    assert read_weights(tmp_path / "out").config["steps"] == 1
    assert not final_images(tmp_path / "out")


def test_a_signal_during_the_last_step_ends_the_run_after_the_weights():
    code = """
import os, signal
from custom_diffusion.training.stopping import StopSignals
signals = StopSignals()
signals.remember()
os.kill(os.getpid(), signal.SIGTERM)
print("written", flush=True)
signals.end_at_once("the weights are there")
print("drawn", flush=True)
"""
    environment = os.environ | launch.ENVIRONMENT
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (128 + signal.SIGTERM, "written\n")
    assert run.stderr.splitlines()[-1] == "the weights are there"


# One of two processes


@pytest.fixture
def generating(run_arguments, tmp_path):
    """A run that draws class images for a long time."""
    changes = {"real_prior": False, "num_class_images": 500, "sample_batch_size": 1}
    return run_arguments | changes | {"class_data_dir": tmp_path / "class", "output_dir": tmp_path / "out"}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_while_class_images_are_drawn_is_not_waited_for(lost, generating, tmp_path):
    runs = launch.run_group(2, generating, tmp_path / "log")
    runs[0].wait_for(lambda: len(list((tmp_path / "class").glob("*.jpg"))) >= 2)
    runs[lost].send(signal.SIGKILL)
    left = runs[1 - lost]
    assert ends_soon(left) == 1
    (message,) = left.messages
    assert message.startswith("another process of this run has ended")
    assert "repeat the command" in message
    assert "Traceback" not in left.output
    assert {path.suffix for path in (tmp_path / "class").iterdir() if not path.name.startswith(".")} == {".jpg"}


@SIGNALS
def test_a_signal_to_one_process_while_class_images_are_drawn_stops_both(number, generating, tmp_path):
    runs = launch.run_group(2, generating, tmp_path / "log")
    runs[0].wait_for(lambda: len(list((tmp_path / "class").glob("*.jpg"))) >= 2)
    runs[1].send(number)
    assert [ends_soon(run) for run in runs] == [128 + number] * 2
    assert [len(run.messages) for run in runs] == [1, 0]
    assert {path.suffix for path in (tmp_path / "class").iterdir()} == {".jpg"}


def test_a_process_that_dies_in_training_is_not_waited_for(run_arguments, tmp_path):
    endless = run_arguments | {"output_dir": tmp_path / "out", "max_train_steps": 10000, "checkpointing_steps": 1}
    endless |= {"checkpoints_total_limit": 2}
    runs = launch.run_group(2, endless, tmp_path / "log")
    runs[0].wait_for(lambda: (tmp_path / "out" / "checkpoint-2").exists())
    runs[1].send(signal.SIGKILL)
    assert ends_soon(runs[0]) == 1
    (message,) = runs[0].messages
    assert message.startswith("another process of this run has ended")
    assert "The last good checkpoint is checkpoint-" in message
    assert "Traceback" not in runs[0].output


def test_the_others_wait_while_one_draws(drawing, tmp_path):
    runs = launch.run_group(2, drawing | {"output_dir": tmp_path / "out"}, tmp_path / "log")
    runs[1].ok()
    assert len(final_images(tmp_path / "out")) == 5
    runs[0].ok()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_while_one_draws_costs_nothing(lost, drawing, tmp_path):
    runs = launch.run_group(2, drawing | {"output_dir": tmp_path / "out"}, tmp_path / "log")
    runs[0].wait_for(lambda: "read them back" in runs[0].output)
    assert not final_images(tmp_path / "out")
    runs[lost].send(signal.SIGKILL)
    left = runs[1 - lost]
    assert left.wait() == 1
    (message,) = left.messages
    assert message.startswith("another process of this run has ended")
    assert f"the trained weights are in '{tmp_path / 'out'}'" in message
    assert "Traceback" not in left.output
    assert read_weights(tmp_path / "out").config["steps"] == 1
    assert bool(final_images(tmp_path / "out")) == (lost == 1)
