"""However a step's samples are shared out among processes and forward passes, the run is the same."""

import contextlib
import json
import os
import subprocess

import launch
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import make_pictures

from custom_diffusion.cli.concepts import Concept
from custom_diffusion.training.class_images import missing_images, share_of

TOLERANCE = 1e-5  # after 5 steps at a learning rate of 1e-3
DRAWING = {"validation_prompt": "<new1> cat", "validation_steps": 3, "num_validation_images": 1}
SAVING = {"checkpointing_steps": 2, "checkpoints_total_limit": 1}


@pytest.fixture(scope="module", params=["tiny_model"])
def arguments(request, run_arguments):
    """`any_family` has the run repeated with the model of another."""
    return run_arguments | DRAWING | SAVING | {"pretrained_model_name_or_path": request.getfixturevalue(request.param)}


any_family = pytest.mark.parametrize(
    "arguments", ["tiny_model", "tiny_xl_model", "tiny_inpainting_model"], indirect=True
)


@pytest.fixture(scope="module")
def one_process(arguments, tmp_path_factory):
    """The run that every other one must equal: one process, batch 4."""
    folder = tmp_path_factory.mktemp("one")
    launch.Run(launch.FORKED, arguments | {"output_dir": folder / "out", "train_batch_size": 4}, folder / "log").ok()
    return folder / "out"


@any_family
def test_two_processes_equal_one(arguments, one_process, tmp_path, trained_difference):
    for run in launch.run_group(2, arguments | {"output_dir": tmp_path / "out"}, tmp_path / "log"):
        run.ok()
    assert trained_difference(one_process, tmp_path / "out") < TOLERANCE
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in one_process.iterdir()}
    for name in ("loss", "instance_loss", "prior_loss", "grad_norm"):  # of all that a step shows, not of one process
        assert logged(tmp_path / "out", name) == pytest.approx(logged(one_process, name), rel=1e-4)


def logged(output_dir, name):
    """A run's values in TensorBoard."""
    events = EventAccumulator(str(output_dir / "logs" / "custom-diffusion"))
    return [event.value for event in events.Reload().Scalars(name)]


@any_family
def test_accumulation_equals_a_bigger_batch(arguments, one_process, tmp_path, trained_difference):
    accumulating = arguments | {"output_dir": tmp_path / "out", "gradient_accumulation_steps": 2}
    launch.Run(launch.FORKED, accumulating, tmp_path / "log").ok()
    assert trained_difference(one_process, tmp_path / "out") < TOLERANCE


def test_two_machines_equal_one_process_and_only_the_first_writes(arguments, one_process, tmp_path, trained_difference):
    port = launch.free_port()
    runs = [
        launch.Run(
            launch.torchrun(1, num_nodes=2, node=node, port=port),
            arguments | {"output_dir": tmp_path / f"disk{node}" / "out"},
            tmp_path / f"disk{node}" / "log",
        )
        for node in range(2)
    ]
    for run in runs:
        run.ok()
    assert trained_difference(one_process, tmp_path / "disk0" / "out") < TOLERANCE
    assert [path.name for path in (tmp_path / "disk1").iterdir()] == ["log"]


@pytest.mark.parametrize(
    "command",
    [launch.ACCELERATE_MULTI_GPU, pytest.param(launch.torchrun(2), marks=pytest.mark.slow)],
    ids=["accelerate launch --multi_gpu", "torchrun"],
)
def test_launchers(command, arguments, one_process, tmp_path, trained_difference):
    launch.Run(command, arguments | {"output_dir": tmp_path / "out"}, tmp_path / "log").ok()
    assert trained_difference(one_process, tmp_path / "out") < TOLERANCE


@pytest.mark.parametrize(
    "changes",
    [
        {"freeze_model": "crossattn", "cache_latents": True, "augmentations_per_image": 2, "lr_scheduler": "cosine"},
        pytest.param({"scale_lr": True, "learning_rate": 1e-4, "noaug": True}, marks=pytest.mark.slow),
        pytest.param({"modifier_token": None, "instance_prompt": "photo of a cat"}, marks=pytest.mark.slow),
        pytest.param({"with_prior_preservation": False, "real_prior": False}, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True, "lr_scheduler": "linear"}, marks=pytest.mark.slow),
        pytest.param({"lr_scheduler": "polynomial", "max_train_steps": None, "num_train_epochs": 3}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: "+".join(changes),
)  # fmt: skip
def test_other_flags_with_two_processes(changes, run_arguments, tmp_path, trained_difference):
    arguments = run_arguments | changes
    whole = arguments | {"output_dir": tmp_path / "one", "train_batch_size": 4}
    launch.Run(launch.FORKED, whole, tmp_path / "log").ok()
    for run in launch.run_group(2, arguments | {"output_dir": tmp_path / "two"}, tmp_path / "log2"):
        run.ok()
    assert trained_difference(tmp_path / "one", tmp_path / "two") < TOLERANCE


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_precision_with_two_processes_stays_near_one(precision, run_arguments, tmp_path, trained_difference):
    arguments = run_arguments | {"mixed_precision": precision, "freeze_model": "crossattn"}
    whole = arguments | {"output_dir": tmp_path / "one", "train_batch_size": 4}
    launch.Run(launch.FORKED, whole, tmp_path / "log").ok()
    for run in launch.run_group(2, arguments | {"output_dir": tmp_path / "two"}, tmp_path / "log2"):
        run.ok()
    assert trained_difference(tmp_path / "one", tmp_path / "two") < 1e-3  # of values that moved by up to 5e-3


# Class images


def generating(arguments, folder, output_dir):
    changes = {"real_prior": False, "num_class_images": 5, "sample_batch_size": 2, "max_train_steps": 1}
    return arguments | changes | {"class_data_dir": folder, "output_dir": output_dir}


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_generated_class_images_are_the_same_from_one_and_two_processes(run_arguments, tmp_path):
    launch.Run(launch.FORKED, generating(run_arguments, tmp_path / "a", tmp_path / "out"), tmp_path / "log").ok()
    drawn = pictures(tmp_path / "a")
    assert sorted(name.split("-")[0] for name in drawn) == ["0", "1", "2", "3", "4"]

    for run in launch.run_group(2, generating(run_arguments, tmp_path / "b", tmp_path / "out2"), tmp_path / "log2"):
        run.ok()
    assert pictures(tmp_path / "b") == drawn


def test_machines_without_a_shared_disk_draw_their_own_class_images(run_arguments, tmp_path):
    groups = [generating(run_arguments, tmp_path / f"disk{rank}", tmp_path / f"out{rank}") for rank in range(2)]
    for run in launch.run_group(2, groups, tmp_path / "log", processes_per_machine=1):
        run.ok()
    first, second = (pictures(tmp_path / f"disk{rank}") for rank in range(2))
    assert first == second
    assert len(first) == 5


@contextlib.contextmanager
def read_only(folder):
    """For root, too."""
    bind = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False)
    if bind.returncode == 0:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    else:
        folder.chmod(0o555)
    try:
        assert not os.access(folder, os.W_OK)
        yield
    finally:
        if bind.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        else:
            folder.chmod(0o755)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_complete_class_folder_may_be_read_only(num_processes, run_arguments, tmp_path):
    folder = make_pictures(tmp_path / "class", 5)
    before = pictures(folder)
    with read_only(folder):
        arguments = generating(run_arguments, folder, tmp_path / "out")
        for run in launch.run_group(num_processes, arguments, tmp_path / "log"):
            assert "Generating" not in run.ok()
    assert pictures(folder) == before


def test_one_complete_class_folder_may_be_read_only_while_another_is_filled(run_arguments, tmp_path):
    names = {"full": make_pictures(tmp_path / "full", 5), "empty": tmp_path / "empty"}
    concepts = [
        {
            "instance_prompt": "photo of a <new1> cat",
            "instance_data_dir": str(run_arguments["instance_data_dir"]),
            "class_prompt": name,
            "class_data_dir": str(folder),
        }
        for name, folder in names.items()
    ]
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    arguments = generating(run_arguments, None, tmp_path / "out") | {"concepts_list": tmp_path / "concepts.json"}
    for name in ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir"):
        arguments[name] = None
    with read_only(names["full"]):
        launch.Run(launch.FORKED, arguments, tmp_path / "log").ok()
    assert len(pictures(names["empty"])) == len(pictures(names["full"])) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_each_class_image_is_drawn_once(tmp_path, count):
    concepts = [Concept("", None, name, tmp_path / name) for name in ("cat", "pot", "cat")]
    (tmp_path / "pot").mkdir()
    for name in ("my own.png", "1-0123.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pot" / name)
    missing = missing_images(concepts, 7)
    assert sorted((c.class_prompt, index) for c, _, index in missing) == [
        *(("cat", index) for index in range(7)),
        *(("pot", index) for index in (0, 2, 3, 4, 5)),
    ]
    shares = [share_of(missing, 2, rank, count) for rank in range(count)]
    dealt = [item for share in shares for batch in share for item in batch]
    assert sorted(map(id, dealt)) == sorted(map(id, missing))
    assert all(batch in share_of(missing, 2, 0, 1) for share in shares for batch in share)
