"""Shared set-up: annotations are checked at run time, dtypes and ranks are strict, real data is found or skipped."""

import os
from pathlib import Path

# Eight host devices let mesh tests run on any machine; must be set before JAX starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hook = install_import_hook("psa_jax", "beartype.beartype")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data of the original project; absent outside the development checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def small_pipeline(tmp_path_factory):
    """A random pipeline of diffusers and the same in JAX: read only."""
    from torch_models import save_torch_pipeline

    from psa_jax.interop.diffusers import load_stable_diffusion

    folder = tmp_path_factory.mktemp("small_pipeline")
    theirs = save_torch_pipeline(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs, load_stable_diffusion(folder / "model")
