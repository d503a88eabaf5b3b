"""What `--resume_from_checkpoint` goes on from, and what it says of a run that is not quite the same."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import launch
import pytest
from tiny import make_model

from custom_diffusion.files import MANIFEST_NAME, STATE_NAME, find_checkpoint, list_checkpoints
from custom_diffusion.training.checkpoints import last_good, read_checkpoint, read_latest_checkpoint
from custom_diffusion.training.settings import check_resumable


@pytest.fixture(scope="module")
def arguments(run_arguments, tmp_path_factory):
    """Flags of a run on a model that can be moved."""
    model = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(run_arguments["pretrained_model_name_or_path"], model)
    changes = {"max_train_steps": 2, "checkpointing_steps": 1, "train_batch_size": 1, "scale_lr": True}
    return run_arguments | changes | {"learning_rate": 1e-4, "pretrained_model_name_or_path": model}


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """The output folder of a run of two processes, with batches of 1."""
    folder = tmp_path_factory.mktemp("trained")
    for run in launch.run_group(2, arguments | {"output_dir": folder / "out"}, folder / "log"):
        run.ok()
    return folder / "out"


@pytest.fixture
def interrupted(arguments, trained, tmp_path):
    """Flags that go on with a copy of that run after its first step."""
    shutil.copytree(trained / "checkpoint-1", tmp_path / "out" / "checkpoint-1")
    return arguments | {"output_dir": tmp_path / "out", "resume_from_checkpoint": "latest"}


def change_manifest(path, change):
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    change(manifest["settings"])
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))


# Samples per step


@pytest.mark.parametrize(
    "changes", [{"train_batch_size": 2}, {"gradient_accumulation_steps": 2}], ids=lambda changes: "+".join(changes)
)
def test_one_process_goes_on_with_what_two_began(changes, interrupted, trained, tmp_path, trained_difference):
    output = launch.Run(launch.FORKED, interrupted | changes, tmp_path / "log").ok()
    assert "Resuming from checkpoint-1" in output
    assert "different run" not in output
    assert trained_difference(trained, tmp_path / "out") < 1e-5


def test_more_samples_per_step_are_told_with_the_flags_that_keep_them(
    interrupted, trained, tmp_path, trained_difference
):
    more = interrupted | {"train_batch_size": 4, "output_dir": tmp_path / "more"}
    shutil.copytree(tmp_path / "out", tmp_path / "more")
    output = launch.Run(launch.FORKED, more, tmp_path / "log").ok()
    (warning,) = [line for line in output.splitlines() if "different run" in line]
    assert "samples_per_step was 2 in the checkpoint and is 4 now" in warning
    flags = re.search("to keep it, use (.*)", warning).group(1)
    assert flags == "--train_batch_size 2 --gradient_accumulation_steps 1"

    followed = dict(zip(*[iter(shlex.split(flags))] * 2))
    followed = interrupted | {name.removeprefix("--"): value for name, value in followed.items()}
    assert "different run" not in launch.Run(launch.FORKED, followed, tmp_path / "log2").ok()
    assert trained_difference(trained, tmp_path / "out") < 1e-5
    assert trained_difference(trained, tmp_path / "more") > 1e-4


@pytest.mark.parametrize("before", [1, 2, 3, 4, 6, 8, 12, 30])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_the_flags_that_are_named_keep_the_samples_per_step(before, num_processes, batch_size, accumulation):
    now = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    now |= {"samples_per_step": num_processes * batch_size * accumulation, "model_configuration": "a"}
    lines = []
    check_resumable(now | {"samples_per_step": before}, now, lines.append)
    if before == now["samples_per_step"]:
        assert not lines
    elif before % num_processes:
        assert lines[0].endswith(f"use a number of processes that divides {before}")
    else:
        size, times = map(int, re.search(r"batch_size (\d+) --gradient_accumulation_steps (\d+)$", lines[0]).groups())
        assert num_processes * size * times == before
        assert batch_size % size == 0, "more in memory at a time than before"
    assert len(lines) <= 1


def test_checkpoints_that_do_not_record_it_compare_the_flags_behind_it():
    before = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "pretrained_model_name_or_path": "m"}
    now = before | {"samples_per_step": 4, "model_configuration": "a"}
    check_resumable(before, now, pytest.fail)
    lines = []
    check_resumable(before, now | {"train_batch_size": 4}, lines.append)
    assert [line.split(": ")[1] for line in lines] == ["train_batch_size was 2 in the checkpoint and is 4 now"]


# No checkpoint that can be read


def test_a_run_without_a_readable_checkpoint_does_not_start_anew(interrupted, trained, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    for path in list_checkpoints(tmp_path / "out"):
        (path / STATE_NAME).write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    run = launch.run(launch.FORKED, interrupted, tmp_path / "log")
    assert run.status == 2
    (message,) = run.messages
    assert message.startswith("--resume_from_checkpoint: none of the checkpoints in")
    assert "can be read (checkpoint-1, checkpoint-2)" in message
    assert "Traceback" not in run.output
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_only_a_folder_without_any_checkpoint_starts_anew(tmp_path):
    assert read_latest_checkpoint(tmp_path / "nowhere", pytest.fail) is None
    (tmp_path / "checkpoint-1").write_text("a file")
    (tmp_path / "checkpoint-x").mkdir()
    assert read_latest_checkpoint(tmp_path, pytest.fail) is None
    (tmp_path / "checkpoint-2").mkdir()
    warnings = []
    with pytest.raises(ValueError, match=r"none of the checkpoints .*\(checkpoint-2\)"):
        read_latest_checkpoint(tmp_path, warnings.append)
    assert len(warnings) == 1
    assert "none of the checkpoints" in last_good(tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def away(*_, **__):
        raise OSError(5, "Input/output error")

    (tmp_path / "checkpoint-2").mkdir()
    monkeypatch.setattr(os, "listdir", away)
    monkeypatch.setattr(os, "scandir", away)
    with pytest.raises(ValueError, match="cannot be read"):
        read_latest_checkpoint(tmp_path, pytest.fail)


def test_a_passing_error_while_a_checkpoint_is_read(trained, monkeypatch):
    reading = Path.read_text

    def away(self, *args, **kwargs):
        if self.name == "custom_diffusion_config.json":
            raise OSError(116, "Stale file handle")
        return reading(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", away)
    with pytest.raises(ValueError, match=r"none of the checkpoints .*\(checkpoint-1, checkpoint-2\)"):
        read_latest_checkpoint(trained, [].append)


# Which checkpoint a path means


def test_a_path_means_that_path(trained, interrupted, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    change_manifest(tmp_path / "out" / "checkpoint-2", lambda settings: settings.update(seed=7))
    changes = {"resume_from_checkpoint": trained / "checkpoint-2", "train_batch_size": 2}
    output = launch.Run(launch.FORKED, interrupted | changes, tmp_path / "log").ok()
    assert "Resuming from checkpoint-2" in output
    assert "different run" not in output  # the output folder's own has another seed


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("out/checkpoint-1", "checkpoint-1", "checkpoint-2", "other/checkpoint-1", "out/other/checkpoint-3"):
        Path(folder).mkdir(parents=True)
    Path("out/best").symlink_to("checkpoint-1")
    meant = {
        "checkpoint-1": "out/checkpoint-1",
        "best": "out/checkpoint-1",
        "checkpoint-2": "checkpoint-2",
        "./checkpoint-1": "checkpoint-1",
        "checkpoint-1/": "checkpoint-1",
        "other/checkpoint-1": "other/checkpoint-1",
        "other/checkpoint-3": None,
        str(tmp_path / "other/checkpoint-1"): "other/checkpoint-1",
        "other/checkpoint-2": None,
        str(tmp_path / "nowhere/checkpoint-1"): None,
        "checkpoint-4": None,
        "out": None,
    }
    found = {name: find_checkpoint(Path("out"), name) for name in meant}
    assert {name: path and path.resolve() for name, path in found.items()} == {
        name: path and Path(path).resolve() for name, path in meant.items()
    }


# Which model it is


def test_a_model_that_moved_is_the_same(interrupted, trained, tmp_path, trained_difference):
    moved = tmp_path / "moved"
    shutil.copytree(interrupted["pretrained_model_name_or_path"], moved)
    changes = {"pretrained_model_name_or_path": moved, "train_batch_size": 2}
    output = launch.Run(launch.FORKED, interrupted | changes, tmp_path / "log").ok()
    (warning,) = [line for line in output.splitlines() if "in the checkpoint" in line]
    assert "the base model moved" in warning
    assert str(moved) in warning
    assert trained_difference(trained, tmp_path / "out") < 1e-5


@pytest.mark.parametrize("older", [False, True], ids=["recorded", "not recorded"])
def test_another_model_is_refused(older, interrupted, tmp_path):
    if older:  # then only the path tells
        change_manifest(tmp_path / "out" / "checkpoint-1", lambda settings: settings.pop("model_configuration"))
    other = make_model(tmp_path / "other", prediction_type="v_prediction")
    changes = {"pretrained_model_name_or_path": other, "train_batch_size": 2}
    run = launch.run(launch.FORKED, interrupted | changes, tmp_path / "log")
    assert run.status == 2
    (message,) = run.messages
    assert message.startswith("--resume_from_checkpoint: the checkpoint does not fit: ")
    assert str(interrupted["pretrained_model_name_or_path"]) in message
    assert "Traceback" not in run.output


def test_older_checkpoints_still_resume(interrupted, trained, tmp_path, trained_difference):
    def as_before(settings):
        del settings["model_configuration"], settings["samples_per_step"]
        settings["train_batch_size"] = 2

    change_manifest(tmp_path / "out" / "checkpoint-1", as_before)
    output = launch.Run(launch.FORKED, interrupted | {"train_batch_size": 2}, tmp_path / "log").ok()
    assert "Resuming from checkpoint-1" in output
    assert "in the checkpoint" not in output
    assert trained_difference(trained, tmp_path / "out") < 1e-5
    assert read_checkpoint(tmp_path / "out" / "checkpoint-2").settings["samples_per_step"] == 2
