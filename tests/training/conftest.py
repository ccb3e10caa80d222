"""A small random base model with SAGE-mini made ready for it: what a training run needs, in seconds."""

from pathlib import Path

import pytest

from psa_jax.tools.configs import read_config
from psa_jax.tools.mini_data import prepare

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.py"


@pytest.fixture(scope="session")
def training_data(small_pipeline, tmp_path_factory) -> Path:
    """Folder with shards and table of 40 train users."""
    folder = tmp_path_factory.mktemp("mini")
    prepare(folder, small_pipeline[1], users=40, seed=3, resolution=32, splits=("train", "val"))
    return folder


@pytest.fixture
def training_config(small_pipeline, training_data):
    """Returns a function: overrides by key -> the smoke configuration on the small model."""

    def make(**overrides):
        values = {
            "model": str(small_pipeline[1].folder),
            "data.shards": str(training_data / "shards"),
            "data.table": str(training_data / "table.safetensors"),
            "data.mini.users": "0",
            **{key: str(value) for key, value in overrides.items()},
        }
        return read_config(f"{CONFIG}:smoke", list(values.items()))

    return make
