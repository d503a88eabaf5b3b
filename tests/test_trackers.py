"""What a real run leaves in TensorBoard's and wandb's files."""

import io
import json
import re
import sys

import numpy as np
import pytest
from launch import FORKED, SCRIPT, run
from PIL import Image
from tiny import make_class_folder, make_pictures

NUM_STEPS = 4
AS_ON_A_GPU = f"""
import runpy
import custom_diffusion.training.reports

class Event:
    def synchronize(self):
        pass

custom_diffusion.training.reports.start_copy = lambda values: (values, Event())
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def logged(tiny_model, tmp_path_factory):
    """Folder of a run that reports to every tracker, wandb offline."""
    root = tmp_path_factory.mktemp("logged")
    make_pictures(root / "cat", 3)
    make_class_folder(root / "class", 3)
    arguments = {
        "pretrained_model_name_or_path": tiny_model, "instance_data_dir": "cat", "instance_prompt": "photo of a <new1> cat",
        "class_data_dir": "class", "class_prompt": "cat", "with_prior_preservation": True, "real_prior": True,
        "num_class_images": 3, "modifier_token": "<new1>", "resolution": 64, "train_batch_size": 1, "learning_rate": 1e-4,
        "scale_lr": True, "lr_scheduler": "linear", "lr_warmup_steps": 0, "max_train_steps": NUM_STEPS,
        "validation_prompt": "<new1> cat in a bucket", "num_validation_images": 2, "validation_steps": 2,
        "dataloader_num_workers": 0, "output_dir": "out", "report_to": "all",
    }  # fmt: skip
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(root), "WANDB_SILENT": "true"}
    run(FORKED, arguments, root / "log.txt", environment).ok()
    late = arguments | {"output_dir": "late", "report_to": "tensorboard", "checkpointing_steps": 3}
    run((sys.executable, "-c", AS_ON_A_GPU), late, root / "late.txt").ok()
    return root


def samples(root, *steps):
    """The pictures that the run wrote, as (number, 64, 64, 3) per step."""
    return {
        s: np.stack([np.asarray(Image.open(root / f"out/samples/step-{s:06d}-{i}.png")) for i in (0, 1)]) for s in steps
    }


def read_tensorboard(output_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output_dir / "logs" / "custom-diffusion"), size_guidance={"images": 0, "tensors": 0})
    return events.Reload()


@pytest.fixture(scope="module")
def tensorboard(logged):
    return read_tensorboard(logged / "out")


def check_losses(series):
    """`series`: name -> NUM_STEPS values."""
    assert np.allclose(series["loss"], np.add(series["instance_loss"], series["prior_loss"]), rtol=1e-5)
    assert all(value > 0 for name in ("instance_loss", "prior_loss", "grad_norm") for value in series[name])
    peak = 2e-4  # with prior preservation, --scale_lr doubles it
    assert np.allclose(series["lr"], [peak * (1 - step / NUM_STEPS) for step in range(1, NUM_STEPS + 1)])
    assert all(value > 0 for value in series["steps_per_second"])


def test_tensorboard_has_losses_rate_norm_and_speed(tensorboard):
    names = ("loss", "instance_loss", "prior_loss", "lr", "grad_norm", "steps_per_second")
    assert set(names) <= set(tensorboard.Tags()["scalars"])
    assert [event.step for event in tensorboard.Scalars("loss")] == list(range(1, NUM_STEPS + 1))
    check_losses({name: [event.value for event in tensorboard.Scalars(name)] for name in names})


def test_numbers_that_arrive_a_step_late_are_those_of_their_step(logged, tensorboard):
    """As on a GPU, which is not waited for at each step, but before a checkpoint and at the end."""
    late = read_tensorboard(logged / "late")
    for name in ("loss", "instance_loss", "prior_loss", "grad_norm", "lr"):
        expected, found = ([(e.step, e.value) for e in events.Scalars(name)] for events in (tensorboard, late))
        assert found == expected and len(found) == NUM_STEPS


def test_tensorboard_has_pictures_and_their_prompt(logged, tensorboard):
    tags = tensorboard.Tags()
    for step, pictures in samples(logged, 0, 2).items():
        [shown] = [event.encoded_image_string for event in tensorboard.Images("validation") if event.step == step]
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(shown))), np.concatenate(pictures, axis=1)
        )  # side by side
    prompts = tensorboard.Tensors("validation/prompt/text_summary")
    assert prompts[0].tensor_proto.string_val[0].decode() == "<new1> cat in a bucket"
    assert {"validation", "test"} == set(tags["images"])


def test_tensorboard_has_the_settings(logged):
    [file] = (logged / "out" / "logs").rglob("hparams.yml")
    text = file.read_text()
    assert (
        "learning_rate: 0.0001" in text and "instance_prompt: photo of a <new1> cat" in text and "hub_token" not in text
    )


def leveldb_records(log):
    """The records of an offline run: LevelDB's log format, in blocks of 32 KiB, after a header of 7 bytes."""
    position, parts = 7, []
    while position < len(log):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        parts.append(log[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


@pytest.fixture(scope="module")
def wandb_records(logged):
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(logged.glob("wandb/offline-run-*/run-*.wandb"))  # some versions of wandb write several
    assert files
    return [Record.FromString(data) for file in files for data in leveldb_records(file.read_bytes())]


def history(records):
    """The logged rows, as dictionaries."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]


def test_wandb_has_losses_rate_norm_and_speed(wandb_records):
    rows = [row for row in history(wandb_records) if "loss" in row]
    assert [row["_step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    check_losses({name: [row[name] for row in rows] for name in rows[0] if not name.startswith("_")})


def test_wandb_has_pictures_with_captions(logged, wandb_records):
    shown = {row["_step"]: row for row in history(wandb_records) if "validation/captions" in row}
    assert set(shown) == {0, 2}
    [files] = logged.glob("wandb/offline-run-*/files")
    for step, pictures in samples(logged, 0, 2).items():
        assert shown[step]["validation/captions"] == ["0: <new1> cat in a bucket", "1: <new1> cat in a bucket"]
        for name, picture in zip(shown[step]["validation/filenames"], pictures):
            assert np.array_equal(np.asarray(Image.open(files / name)), picture)
    assert any("test/captions" in row for row in history(wandb_records))


def test_wandb_has_the_settings(wandb_records):
    updates = {}
    for record in wandb_records:
        for config in (record.config, record.run.config):
            updates |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in config.update}
    assert updates["instance_prompt"] == "photo of a <new1> cat" and updates["learning_rate"] == 1e-4
    assert "hub_token" not in updates


def test_without_a_tracker_nothing_is_logged(run_arguments, tmp_path):
    arguments = run_arguments | {"output_dir": tmp_path / "out", "report_to": "none", "max_train_steps": 1}
    run(FORKED, arguments, tmp_path / "log").ok()
    assert (tmp_path / "out" / "<new1>.bin").is_file()
    assert not (tmp_path / "out" / "logs").exists()


def test_a_log_has_a_line_now_and_then(run_arguments, tmp_path):
    """On a terminal the bar moves; in a file its steps stand once each, and not all of them."""
    arguments = run_arguments | {"output_dir": tmp_path / "out", "max_train_steps": 8, "report_to": "none"}
    log = tmp_path / "log"
    every = run(FORKED, arguments, log).ok()
    steps = re.findall(r"Steps:.* (\d+)/8 \[", every)
    assert steps == sorted(set(steps)) and steps[-1] == "8"
    assert b"\r" not in log.read_bytes().rpartition(b"Training ")[2]
    seldom = run(FORKED, arguments, tmp_path / "log2", env={"TQDM_MININTERVAL": "10"}).ok()
    assert len(re.findall(r"Steps:.* \d+/8 \[", seldom)) <= 3
