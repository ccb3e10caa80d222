"""Where JAX keeps compiled programs between two commands: compiling a step of Stable Diffusion takes minutes."""

import hashlib
import os
import platform
import sys
from collections.abc import MutableMapping
from pathlib import Path

from psa_jax.remote import cache_place

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
"""Environment variable of JAX; with an empty value nothing is kept."""
_CPUS = Path("/proc/cpuinfo")


def keep_compiled(environment: MutableMapping[str, str]) -> None:
    """Gives JAX a folder in this user's cache, for this process and those that it starts, unless it was given one.

    Programs for a CPU use what that CPU has, and a home may be shared by unlike machines: each kind has its own folder.
    Where the user's cache cannot be written nothing is kept. After JAX has been imported it is too late.

    Args:
      environment: of the process.
    """
    if VARIABLE in environment or "jax" in sys.modules:
        return
    place = cache_place()
    if place is None:
        return
    folder = place / "compiled" / _kind_of_cpu()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment[VARIABLE] = str(folder)


def _kind_of_cpu() -> str:
    """Name of this machine's architecture and of what its CPU can do."""
    lines = _CPUS.read_text(encoding="utf-8").splitlines() if _CPUS.is_file() else []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(able.encode()).hexdigest()[:8]}"
