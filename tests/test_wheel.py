"""What a wheel carries: it runs in an empty folder, far from any clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("psa_jax", "configs", "setup.py", "pyproject.toml", "README.md", "MANIFEST.in")
SERVING = "psa_jax/torch/requirements.txt"


def test_it_runs_from_a_wheel(tmp_path):
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    for name in BUILT_FROM:  # a copy: building leaves files behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, f"--wheel-dir={tmp_path}", str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("psa_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    theirs = {path.name: path.read_bytes() for path in (ROOT / "configs").glob("*.py")}
    assert {path.name: path.read_bytes() for path in (site / "psa_jax" / "configs").iterdir()} == theirs
    names = ["tiny", "tiny:smoke", *(path.stem for path in (ROOT / "configs").glob("s*.py"))]
    assert (site / SERVING).read_bytes() == (ROOT / SERVING).read_bytes()
    empty.mkdir()
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
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=empty, env=environment)
    assert done.stdout == f"{site / 'psa_jax' / '__init__.py'} tiny 800 4 5000 5000 5000\n", done.stderr
