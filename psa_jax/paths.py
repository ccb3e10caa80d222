"""Paths as users give them: what would be another place than they meant is refused. Imports nothing heavy."""

import os
import re
from pathlib import Path

from psa_jax.errors import PSAError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?=/)")


def local_path(text: str) -> Path:
    """The path that a text names.

    Raises:
      PSAError: an empty text, a zero byte, bytes that are no UTF-8, or an address such as gs://bucket/x, for which
        pathlib would make a folder here.
    """
    if not text:
        raise PSAError("an empty path; give one, such as . for the folder you are in")
    if "\0" in text:
        raise PSAError(f"{text!r}: a path cannot hold a zero byte")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # Python hands over such bytes as halves of surrogate pairs
        raise PSAError(
            f"{ascii(text)}: a path that is not UTF-8, which neither JSON nor a model card can hold; rename it"
        ) from error
    if _SCHEME.match(text):
        raise PSAError(f"{text}: only paths on this machine can be used; copy or mount it and give the local path")
    return Path(text)


def check_workdir(path: Path) -> None:
    """Raises PSAError for a path in which checkpoints would be written somewhere else, or that cannot be a folder."""
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise PSAError(f"{there}: not a folder; give a --workdir that is one, or is not there yet")
    if "\\" in str(path.absolute()):
        raise PSAError(
            f"{path}: TensorStore, which writes checkpoints, takes a backslash for /, so that they would be elsewhere; "
            "use a --workdir without it"
        )
