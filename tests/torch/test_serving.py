"""An installation that only draws: what `psa_jax.torch` needs is psa_jax/torch/requirements.txt, and nothing of JAX."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.torch_adapters import random_adapter

from psa_jax.interop.diffusers import TINY, load_unet
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "psa_jax" / "torch" / "requirements.txt"
BUILT_FROM = ("psa_jax", "configs", "setup.py", "pyproject.toml", "README.md", "MANIFEST.in")
WITH_DIFFUSERS = {"accelerate", "transformers"}
"""Stable Diffusion's pipelines and CPU offload need them; psa_jax.torch does not name them."""

NEEDLESS = (
    *("jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "ml_collections", "array_record"),
    *("etils", "absl", "ml_dtypes", "scipy", "tensorboardX", "peft", "beartype", "matplotlib"),
)

# Finders that find all but NEEDLESS, for `import` and for libraries that ask what is installed.
HIDE = f"""
import sys
NEEDLESS = {NEEDLESS}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in NEEDLESS else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in NEEDLESS:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " is still there")
"""

SERVE = """
import json, sys
import numpy as np
from diffusers import StableDiffusionPipeline
import psa_jax
from psa_jax.torch import initial_latents, load_psa

pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipe.set_progress_bar_config(disable=True)
psa = load_psa(pipe, "adapter.safetensors", table="table.safetensors")

def draw(user):
    noise = initial_latents([7], (pipe.unet.config.in_channels, *[64 // pipe.vae_scale_factor] * 2))
    call = dict(num_inference_steps=2, latents=noise, output_type="np")
    return psa("a house in the snow", user=user, **call).images

first, second = draw("0000001"), draw("0000002")
assert first.shape == (1, 64, 64, 3) and np.isfinite(first).all()
assert np.abs(first - second).max() > 0.01
modules = [getattr(sys.modules[name], "__file__", None) for name in sorted(sys.modules) if name.startswith("psa_jax")]
needless = [name for name in sys.argv[2:] if name in sys.modules]
print(json.dumps({"file": psa_jax.__file__, "needless": needless, "read": modules}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter and a table for the embedded model, and nothing else."""
    folder, encoder = tmp_path_factory.mktemp("serving"), get_encoder("features")
    EmbeddingTable.from_profiles(sample_population(3), encoder).save(folder / "table.safetensors")
    config = AdapterConfig.for_unet(load_unet(TINY).config, user_dim=encoder.dim, kind="text")
    save_adapter(random_adapter(config), folder / "adapter.safetensors", {"encoder": encoder.name})
    return folder


def serve(python: str | Path, folder: Path, code: str, model: Path, **variables: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = [python, "-W", "ignore", "-c", code, str(model), *NEEDLESS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def requirements(text: str) -> dict[str, str]:
    """Name -> the whole line."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {re.match(r"[\w.-]+", line)[0]: line for line in lines}


def test_it_draws_where_jax_is_not(folder):
    told = serve(sys.executable, folder, HIDE + SERVE, TINY, PYTHONPATH=str(ROOT))
    assert told["needless"] == []
    names = set()
    for path in told["read"]:
        tree = ast.parse(Path(path).read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    top = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"psa_jax"}
    assert top | WITH_DIFFUSERS == requirements(REQUIREMENTS.read_text()).keys()


def test_the_bounds_are_those_of_the_whole_package():
    setup = (ROOT / "setup.py").read_text()
    for line in requirements(REQUIREMENTS.read_text()).values():
        assert f'"{line}"' in setup


def test_a_command_that_needs_more_says_so(tmp_path):
    for words in (["generate", "--model=tiny", "--prompt=a", "--out=o"], ["demo", "--workdir=w"]):
        code = f"{HIDE}\nfrom psa_jax.cli import main\nsys.exit(main({words}))"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 1
        assert re.fullmatch(r"psa-jax: error: psa-jax \w+ needs \w+, which is not installed; .*\n", done.stderr)
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_an_environment_of_its_own(folder, tmp_path):
    """As docs/torch.md says: the requirements, and then the package without its dependencies."""
    source, environment = tmp_path / "source", tmp_path / "environment"
    source.mkdir()
    for name in BUILT_FROM:  # a copy: building leaves files behind
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"

    def install(*words: str | Path) -> subprocess.CompletedProcess:
        command = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *words]
        return subprocess.run(command, capture_output=True, text=True)

    probe = install(requirements(REQUIREMENTS.read_text())["safetensors"])
    if probe.returncode:
        pytest.skip(f"pip cannot install here: {probe.stderr.splitlines()[-1]}")
    for words in (["-r", source / "psa_jax" / "torch" / "requirements.txt"], ["--no-deps", source]):
        done = install(*words)
        assert done.returncode == 0, done.stderr[-3000:]
    seconds = time.monotonic() - began
    size = int(subprocess.run(["du", "-sm", environment], capture_output=True, text=True, check=True).stdout.split()[0])
    print(f"\npsa_jax.torch alone: {seconds:.0f} s, {size} MB")
    told = serve(python, folder, SERVE, TINY)
    assert Path(told["file"]).is_relative_to(environment)
    assert told["needless"] == []
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    assert not {line.partition("==")[0].replace("-", "_") for line in listed.stdout.splitlines()} & set(NEEDLESS)
