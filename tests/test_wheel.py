"""What a wheel carries: it runs in an empty folder, far from any clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import psa_jax

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("psa_jax", "configs", "setup.py", "pyproject.toml", "README.md", "MANIFEST.in")
SERVING = "psa_jax/torch/requirements.txt"


class Installed(NamedTuple):
    """An environment in which a wheel was installed: of this clone it holds nothing else.

    Attributes:
      wheel: the file.
      folder: the environment's.
    """

    wheel: Path
    folder: Path

    def run(self, cwd: Path, script: str, *words: str) -> subprocess.CompletedProcess:
        """Runs a script of the environment as from a terminal that knows no clone."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        cwd.mkdir(exist_ok=True)
        command = [self.folder / "bin" / script, *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=kept)


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """The wheel is built and installed without a network; what it depends on is that of the tests' environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in BUILT_FROM:  # a copy: building leaves files behind
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)

    def pip(*words: str | Path) -> None:
        command = [sys.executable, "-m", "pip", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={folder}", source)
    (wheel,) = folder.glob("psa_jax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip("--python", environment / "bin" / "python", "install", "-q", "--no-deps", "--no-index", wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    # A folder named in a .pth is searched for packages, but its own .pth, such as that of an editable clone, are not.
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return Installed(wheel, environment)


def test_a_wheel_holds_configurations_and_requirements(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        names = archive.namelist()
        configs = [name for name in names if name.startswith("psa_jax/configs/")]
        theirs = {name.removeprefix("psa_jax/"): archive.read(name) for name in configs}
        assert archive.read(SERVING) == (ROOT / SERVING).read_bytes()
    ours = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in (ROOT / "configs").rglob("*.py")}
    assert theirs == ours and "configs/sweeps/usual.py" in ours
    assert not [name for name in names if not name.startswith(("psa_jax/", "psa_jax-"))]


def test_it_runs_from_a_wheel(installed, tmp_path):
    names = ["tiny", "tiny:smoke", *(path.stem for path in (ROOT / "configs").glob("s*.py"))]
    code = (
        "import psa_jax, argparse\n"
        "from psa_jax.tools import arguments\n"
        "from psa_jax.tools.configs import read_config\n"
        "parser = argparse.ArgumentParser()\n"
        "arguments.demo(parser)\n"
        "config = read_config(parser.parse_args(['--workdir=demo']).config)\n"
        f"steps = [read_config(name).steps for name in {names}]\n"
        "print(psa_jax.__file__, config.model, *steps)\n"
    )
    done = installed.run(tmp_path / "empty", "python", "-c", code)
    file, *rest = done.stdout.split()
    assert rest == ["tiny", "800", "4", "5000", "5000", "5000"], done.stderr
    assert Path(file).is_relative_to(installed.folder)


def test_its_command_runs_and_importing_it_is_quick(installed, tmp_path):
    """Quick is what imports nothing heavy: a time would depend on the machine."""
    heavy = ["jax", "flax", "numpy", "torch", "transformers", "diffusers", "tensorflow_datasets", "PIL"]
    code = f"import sys, psa_jax; print(psa_jax.__file__, [name for name in {heavy} if name in sys.modules])"
    file, found = installed.run(tmp_path / "empty", "python", "-c", code).stdout.split(maxsplit=1)
    assert Path(file).is_relative_to(installed.folder) and found == "[]\n"
    done = installed.run(tmp_path / "empty", "psa-jax", "--version")
    assert done.stdout == f"psa-jax {psa_jax.__version__}\n", done.stderr
    done = installed.run(tmp_path / "empty", "psa-jax", "mini", "--users=1", "--seed=4", "--out=sage")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"]["train"] > 0
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["sage"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_runs_from_a_wheel(installed, tmp_path):
    """Assets, templates, configurations: all that the demo reads is in the wheel."""
    done = installed.run(tmp_path / "empty", "psa-jax", "demo", "--config=tiny:smoke", "--workdir=demo")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "empty" / "demo"
    report = json.loads((folder / "report.json").read_text())
    assert report["command"].endswith("psa-jax demo --config=tiny:smoke --workdir=demo")
    assert "One prompt, a picture for each user" in (folder / "report.html").read_text()
    assert (folder / "grid.png").stat().st_size > 10_000
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["demo"]
