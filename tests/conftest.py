"""What several test files share: tiny models, and quiet libraries."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; and the suite itself runs in parallel
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a Hub brings its own

import pytest
from tiny import make_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random epsilon-prediction model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_v_model(tmp_path_factory):
    """Folder of a random v-prediction model."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-v", "v_prediction", seed=1)
