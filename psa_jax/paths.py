"""Paths as users give them: what would be another place than they meant is refused. Imports nothing heavy."""

import re
from pathlib import Path

from psa_jax.errors import PSAError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?=/)")


def local_path(text: str) -> Path:
    """The path that a text names.

    Raises:
      PSAError: an empty text, a zero byte, or an address such as gs://bucket/x, for which pathlib would make a folder
        here.
    """
    if not text:
        raise PSAError("an empty path; give one, such as . for the folder you are in")
    if "\0" in text:
        raise PSAError(f"{text!r}: a path cannot hold a zero byte")
    if _SCHEME.match(text):
        raise PSAError(f"{text}: only paths on this machine can be used; copy or mount it and give the local path")
    return Path(text)


def check_workdir(path: Path) -> None:
    """Raises PSAError for a path in which checkpoints would be written somewhere else."""
    if "\\" in str(path.absolute()):
        raise PSAError(
            f"{path}: TensorStore, which writes checkpoints, takes a backslash for /, so that they would be elsewhere; "
            "use a --workdir without it"
        )
