"""Compiled programs are kept for the next command, where the user did not say something else."""

import os
import subprocess
import sys

import pytest

from psa_jax import compiled
from psa_jax.compiled import VARIABLE, keep_compiled

COMPILES = """
import os, sys
from psa_jax.compiled import keep_compiled
keep_compiled(os.environ)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
import jax
print(jax.jit(lambda x: x + 1.0)(1.0))
"""


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A user's home, in a process that has not imported JAX."""
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.delenv("PSA_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def kept(environment: dict[str, str]) -> str | None:
    keep_compiled(environment)
    return environment.get(VARIABLE)


def test_jax_writes_there(home):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "2.0\n", done.stderr
    (kind,) = (home / ".cache" / "psa_jax" / "compiled").iterdir()
    assert list(kind.iterdir()) and str(kind) == kept({})
    assert (home / ".cache" / "psa_jax").stat().st_mode & 0o777 == 0o700


def test_each_kind_of_cpu_has_a_folder(home, monkeypatch, tmp_path):
    found = set()
    for able in ("flags : sse avx", "flags : sse avx avx512f"):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{able}\nMHz : 2000\n")
        monkeypatch.setattr(compiled, "_CPUS", tmp_path / "cpuinfo")
        found.add(kept({}))
    assert len(found) == 2


@pytest.mark.parametrize("given", ["/somewhere", ""])
def test_what_the_user_says_stays(home, given):
    assert kept({VARIABLE: given}) == given
    assert not (home / ".cache").exists()


def test_too_late(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", sys)
    assert kept({}) is None


def test_a_cache_that_cannot_be_written(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert kept({}) is None and not (home / ".cache").exists()
    monkeypatch.undo()


def test_other_places(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert kept({}).startswith(f"{home}/.cache/psa_jax/compiled/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert kept({}).startswith(f"{home}/xdg/psa_jax/compiled/")
    monkeypatch.setenv("PSA_JAX_CACHE", str(home / "own"))
    assert kept({}).startswith(f"{home}/own/compiled/")
