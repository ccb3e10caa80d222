"""Shared set-up: annotations are checked at run time, dtypes and ranks are strict, real data is found or skipped."""

import functools
import gc
import os
from importlib import metadata
from pathlib import Path

# Eight host devices let mesh tests run on any machine; must be set before JAX starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time of these tests; the results are float32 either way.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # They take a third of the time. Later versions cannot do without them, and stop at a flag they do not know.
        "--xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib").startswith("0.10.") else "",
    )
)

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jaxtyping import install_import_hook
from support import annotations

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

hook = install_import_hook("psa_jax", f"{annotations.__name__}.{annotations.checked.__name__}")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


LONGEST = ("multiprocess/test_processes.py", "tools/test_demo.py", "training/test_swap.py", "faults/test_kills.py")
LONGEST += ("faults/test_buckets.py",)
"""Files that take longest: begun last, they would keep one process busy while the others have ended."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order of all others stays."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


def pytest_collection_finish() -> None:
    """Leaves what all tests share, such as modules, out of Python's garbage collections, and makes these rarer.

    Each that walks through the million objects of JAX, torch and diffusers takes a third of a second: a tenth of the
    whole run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """Compiles what takes long once in a process: many tests build the same step or sampler again."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder  # also for the processes that tests start
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    reset_cache()  # else one that was off at the first compilation stays off


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data of the original project; absent outside the development checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def small_pipeline(sd1):
    """A random pipeline of diffusers and the same in JAX: read only."""
    from psa_jax.interop.diffusers import load_stable_diffusion

    folder, theirs = sd1
    return theirs, load_stable_diffusion(folder)


@pytest.fixture(scope="session")
def smallest_pipeline(tmp_path_factory):
    """The same as small as it can be, for what compiles a step or a sampler often: read only."""
    from psa_jax.interop.diffusers import load_stable_diffusion

    folder, theirs = _saved(tmp_path_factory, "smallest")
    return theirs, load_stable_diffusion(folder)


@pytest.fixture(scope="session")
def run_inputs(smallest_pipeline, tmp_path_factory) -> tuple[Path, Path]:
    """Folder of the smallest model, and one with shards of SAGE-mini and a table for it."""
    from psa_jax.mini.prepare import prepare

    model, folder = smallest_pipeline[1], tmp_path_factory.mktemp("run_inputs")
    prepare(folder, model, users=8, seed=3, resolution=32, splits=("train",))
    return model.folder, folder


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """A folder of a random pipeline and the pipeline of diffusers that wrote it: read only."""
    return _saved(tmp_path_factory, "sd1")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    return _saved(tmp_path_factory, "sd2")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    return _saved(tmp_path_factory, "sdxl")


def _saved(tmp_path_factory, family: str):
    from support.torch_models import save_torch_pipeline
    from support.torch_pipelines import save_sd2, save_sdxl

    folder = tmp_path_factory.mktemp(family)
    save = {
        "sd1": save_torch_pipeline,
        "smallest": functools.partial(save_torch_pipeline, smallest=True),
        "sd2": save_sd2,
        "sdxl": save_sdxl,
    }
    theirs = save[family](folder)
    theirs.set_progress_bar_config(disable=True)
    return folder / "model", theirs


@pytest.fixture(scope="session")
def browser():
    """An installed Chromium; skips where there is none."""
    from support.browser import running_browser

    with running_browser() as running:
        yield running


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of objects, to which the environment points for s3:// and gs://; copies go to a folder of the test."""
    from support.object_server import ObjectServer  # imported late: for the tests of buckets alone

    with ObjectServer().running() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PSA_JAX_CACHE", str(tmp_path / "cache"))
        yield server
