"""What several test files share: tiny models, and quiet libraries."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; and the suite itself runs in parallel
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a Hub brings its own

import pytest
from tiny import make_class_folder, make_model, make_pictures, make_xl_model

from custom_diffusion.weights.format import read_weights


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random epsilon-prediction model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_v_model(tmp_path_factory):
    """Folder of a random v-prediction model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-v", "v_prediction", seed=1)


@pytest.fixture(scope="session")
def tiny_xl_model(tmp_path_factory):
    """Folder of a random model with two text encoders."""
    return make_xl_model(tmp_path_factory.mktemp("models") / "tiny-xl", seed=2)


@pytest.fixture(scope="session")
def tiny_inpainting_model(tmp_path_factory):
    """Folder of a random inpainting model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-inpainting", seed=3, in_channels=9)


@pytest.fixture(scope="session", params=["sd", "sdxl"])
def any_model(request):
    """Folder of a random model of each family."""
    return request.getfixturevalue({"sd": "tiny_model", "sdxl": "tiny_xl_model"}[request.param])


@pytest.fixture(scope="session", params=["tiny_model", "tiny_xl_model", "tiny_inpainting_model"])
def any_unet(request):
    """Folder of a random model of each kind of UNet: with text alone, with conditions beside it, with holes to paint."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def run_arguments(tiny_model, tmp_path_factory):
    """Flags of a short run with prior preservation on the tiny model; the numbers of pictures fit no batch."""
    data = tmp_path_factory.mktemp("data")
    return {
        "pretrained_model_name_or_path": tiny_model,
        "instance_data_dir": make_pictures(data / "photos", 5),
        "class_data_dir": make_class_folder(data / "class", 7),
        "instance_prompt": "photo of a <new1> cat",
        "class_prompt": "cat",
        "modifier_token": "<new1>",
        "with_prior_preservation": True,
        "real_prior": True,
        "num_class_images": 7,
        "resolution": 64,
        "hflip": True,
        "train_batch_size": 2,
        "max_train_steps": 5,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,  # Adam divides by the gradient's size; with 1e-8, float rounding would decide signs
        "lr_warmup_steps": 0,
        "dataloader_num_workers": 0,
    }


@pytest.fixture
def trained_difference():
    """(folder, folder) -> the largest difference between any two of their trained values."""

    def difference(folder, other):
        one, two = ({**w.tensors, **w.tokens} for w in map(read_weights, (folder, other)))
        assert one.keys() == two.keys()
        return max((one[name] - two[name]).abs().max().item() for name in one)

    return difference
