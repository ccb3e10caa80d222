"""Checks of paths that users give. Imports nothing heavy."""

import os
import re
from pathlib import Path

from psa_jax.errors import PSAError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?=/)")


def local_path(text: str) -> Path:
    """Converts text to a path on this machine.

    Raises:
      PSAError: the text is empty, holds a zero byte, is not UTF-8, or is an address such as gs://bucket/x, of which
        pathlib would make a local folder.
    """
    if not text:
        raise PSAError("an empty path; give one, such as . for the folder you are in")
    if "\0" in text:
        raise PSAError(f"{text!r}: a path cannot hold a zero byte")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # such bytes arrive as lone surrogates
        raise PSAError(
            f"{ascii(text)}: a path that is not UTF-8, which neither JSON nor a model card can hold; rename it"
        ) from error
    if _SCHEME.match(text):
        raise PSAError(f"{text}: only paths on this machine can be used; copy or mount it and give the local path")
    return Path(text)


def file_inside(folder: Path, name: str, field: str) -> Path:
    """The path of a file that data name, which has to be below their folder.

    Args:
      folder: of the data.
      name: as it is written there, such as pictures/1.png.
      field: that names it, for the message.

    Raises:
      PSAError: the name leads out of the folder, also by a link, or there is no such file.
    """
    path = folder / name
    if not name.isprintable() or Path(name).is_absolute() or "\\" in name or ".." in Path(name).parts:
        raise PSAError(f"{field} must be a path inside the folder, such as pictures/1.png")
    if not path.is_file():
        raise PSAError(f"{field}: no such picture; give a path below the folder, and restore what is missing")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise PSAError(f"{field}: the picture is a link that leads out of the folder; copy it there")
    return path


def check_workdir(path: Path) -> None:
    """Checks that a working folder can be made and used.

    Raises:
      PSAError: the path or a part of it is a file, or it holds a backslash, which TensorStore would read as a slash.
    """
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if there is not None and not there.is_dir():
        raise PSAError(f"{there}: not a folder; give a --workdir that is one, or is not there yet")
    if "\\" in str(path.absolute()):
        raise PSAError(
            f"{path}: TensorStore, which writes checkpoints, takes a backslash for /, so that they would be elsewhere; "
            "use a --workdir without it"
        )
