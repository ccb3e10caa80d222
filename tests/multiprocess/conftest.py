"""A small base model and SAGE-mini for it."""

from pathlib import Path

import pytest

from psa_jax.mini.prepare import prepare


@pytest.fixture(scope="session")
def run_inputs(smallest_pipeline, tmp_path_factory) -> tuple[Path, Path]:
    """Folder of the model, folder with shards and table."""
    model, folder = smallest_pipeline[1], tmp_path_factory.mktemp("run_inputs")
    prepare(folder, model, users=8, seed=3, resolution=32, splits=("train",))
    return model.folder, folder
