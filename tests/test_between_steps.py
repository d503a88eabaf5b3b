"""What is done between two steps of training costs them neither time nor memory, and asks no server."""

import functools
import shutil
import time
import weakref

import launch
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from hub_server import HubServer
from test_trackers import read_tensorboard

from custom_diffusion.training import reports as step_reports
from custom_diffusion.training.run_folder import RunFolder
from custom_diffusion.training.validation import Validation

SLOW = 4  # seconds; a step of the tiny model takes a tenth of one, on a busy machine one
DRAWING = {"validation_prompt": "cat", "num_validation_images": 1, "validation_steps": 2}


def slow_between_steps():
    for holder, name in ((Validation, "during_training"), (RunFolder, "save_checkpoint")):
        setattr(holder, name, slowly(getattr(holder, name)))


def slowly(function):
    @functools.wraps(function)
    def wait_first(*args, **kwargs):
        time.sleep(SLOW)
        return function(*args, **kwargs)

    return wait_first


def test_steps_per_second_leaves_out_images_and_checkpoints(run_arguments, tmp_path):
    changes = DRAWING | {"checkpointing_steps": 3, "output_dir": tmp_path / "out", "report_to": "tensorboard"}
    launch.Run(launch.FORKED, run_arguments | changes, tmp_path / "log", changed_by=slow_between_steps).ok()
    events = read_tensorboard(tmp_path / "out").Scalars("steps_per_second")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]  # of which 1, 3 and 5 follow images, 4 a checkpoint
    assert all(event.value > 1 / SLOW for event in events)


def test_steps_per_second_counts_the_computing_of_a_gpu(monkeypatch):
    class Event:
        def synchronize(self):
            time.sleep(0.05)

    monkeypatch.setattr(step_reports, "start_copy", lambda values: (values, Event()))
    reports = step_reports.StepReports(Accelerator(cpu=True))
    done = []
    for step in range(1, 5):  # each is handed over at once, and is known when the GPU has done it
        done += reports.exchange(step, {"loss": torch.tensor(1.0)}, torch.tensor(0.5), 0, lr=1e-3)
        if step == 2:
            done += reports.latest()
            time.sleep(1)  # a checkpoint
            reports.restart_clock()
    done += reports.latest()
    assert [report.step for report in done] == [1, 2, 3, 4]
    assert all(0.05 <= report.seconds < 0.5 for report in done)


def count_vaes():
    """At each training step, print how many decoders and encoders are in memory. Nothing is collected for it."""
    vaes = weakref.WeakSet()
    make, backward = AutoencoderKL.__init__, Accelerator.backward

    @functools.wraps(make)
    def make_counted(self, *args, **kwargs):
        make(self, *args, **kwargs)
        vaes.add(self)

    def count(self, loss):
        decoders, encoders = ([getattr(vae, part) is not None for vae in vaes] for part in ("decoder", "encoder"))
        print(f"\nin memory: {sum(decoders)} decoders, {sum(encoders)} encoders", flush=True)
        backward(self, loss)

    AutoencoderKL.__init__, Accelerator.backward = make_counted, count


@pytest.mark.parametrize("cache_latents", [False, True])
def test_between_validations_no_decoder_is_in_memory(cache_latents, run_arguments, tmp_path):
    changes = DRAWING | {"cache_latents": cache_latents, "augmentations_per_image": 1, "output_dir": tmp_path / "out"}
    changes |= {"max_train_steps": 10, "validation_steps": 4}  # after 4 steps of 2 samples all of the images were seen
    output = launch.Run(launch.FORKED, run_arguments | changes, tmp_path / "log", changed_by=count_vaes).ok()
    counts = [line.removeprefix("in memory: ") for line in output.splitlines() if line.startswith("in memory")]
    assert len(counts) == 10
    assert counts[0] == "0 decoders, 1 encoders"
    assert set(counts) == {"0 decoders, 1 encoders"} | ({"0 decoders, 0 encoders"} if cache_latents else set())
    assert counts[-1] == f"0 decoders, {0 if cache_latents else 1} encoders"
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 4


def remove_during_training(folder):
    backward = Accelerator.backward

    def remove_first(self, loss):
        shutil.rmtree(folder, ignore_errors=True)
        backward(self, loss)

    Accelerator.backward = remove_first


def test_a_model_that_goes_away_during_training_costs_images_only(run_arguments, tmp_path):
    model = shutil.copytree(run_arguments["pretrained_model_name_or_path"], tmp_path / "model")
    changes = DRAWING | {"pretrained_model_name_or_path": model, "output_dir": tmp_path / "out"}
    change = functools.partial(remove_during_training, model / "vae")
    output = launch.Run(launch.FORKED, run_arguments | changes, tmp_path / "log", changed_by=change).ok()
    assert output.count("no images are drawn this time: --pretrained_model_name_or_path: ") == 3
    assert "and read them back" in output
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == ["step-000000-0.png"]


def test_a_hub_that_goes_away_during_training_is_not_missed(run_arguments, tmp_path):
    model = run_arguments["pretrained_model_name_or_path"]
    files = {str(path.relative_to(model)): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    changes = DRAWING | {"pretrained_model_name_or_path": "tester/base", "output_dir": tmp_path / "out"}
    with HubServer() as hub:
        hub.repositories["tester/base"] = files
        environment = hub.environment(tmp_path / "cache", token=None) | {"HF_HUB_OFFLINE": "0"}
        run = launch.Run(launch.PLAIN, run_arguments | changes, tmp_path / "log", environment)
        run.wait_for(lambda: "Training" in run.output)
        hub.refuse = "."
        asked = len(hub.requests)
        run.ok()
    assert asked
    assert hub.requests[asked:] == []
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 4
