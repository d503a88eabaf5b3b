"""What the course of a run depends on, and what it does not."""

import sys

import launch
import pytest

from custom_diffusion.model.loading import base_tensors
from custom_diffusion.model.source import ModelSource
from custom_diffusion.weights.format import read_weights

# The script in a process in which other code has used the generators that all share.
SEEDED = f"""
import os, random, runpy, sys
import numpy, torch
seed = int(os.environ["SEED_OF_ALL"])
random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)
sys.argv[0] = {launch.SCRIPT!r}
runpy.run_path({launch.SCRIPT!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("max_grad_norm", "least", "most"),
    [(1e-6, 0, 1e-5), ("inf", 1e-4, 1.001e-3)],
    ids=["clipped", "not clipped"],
)
def test_gradients_are_clipped_to_max_grad_norm(max_grad_norm, least, most, run_arguments, tmp_path):
    """Adam's first step moves a weight by rate x g / (|g| + epsilon): at most rate x norm / epsilon, or nearly the rate."""
    one_step = {"max_train_steps": 1, "adam_weight_decay": 0, "learning_rate": 1e-3, "adam_epsilon": 1e-4}
    arguments = run_arguments | one_step | {"max_grad_norm": max_grad_norm, "output_dir": tmp_path / "out"}
    launch.run(launch.FORKED, arguments, tmp_path / "log").ok()
    trained = read_weights(tmp_path / "out").tensors
    base = base_tensors(ModelSource(str(run_arguments["pretrained_model_name_or_path"])), trained)
    moved = max((trained[name] - base[name]).abs().max().item() for name in trained)
    assert least <= moved <= most
    assert moved > 0


def test_a_run_does_not_depend_on_random_numbers_that_others_draw(run_arguments, tmp_path, trained_difference):
    everything = run_arguments | {
        "real_prior": False, "num_class_images": 3, "max_train_steps": 2, "dataloader_num_workers": 1,
        "validation_prompt": "<new1> cat", "num_validation_images": 1, "lr_scheduler": "cosine",
    }  # fmt: skip
    files = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        arguments = everything | {"class_data_dir": folder / "class", "output_dir": folder / "out"}
        launch.run((sys.executable, "-c", SEEDED), arguments, folder / "log", {"SEED_OF_ALL": seed}).ok()
        images = [*(folder / "class").iterdir(), *(folder / "out" / "samples").iterdir()]
        assert len(images) == 5
        files.append({path.name: path.read_bytes() for path in images})
    assert files[0] == files[1]
    assert trained_difference(tmp_path / "1" / "out", tmp_path / "2" / "out") == 0
