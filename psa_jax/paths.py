"""Checks of paths that users give. Imports nothing heavy."""

import dataclasses
import os
import re
from pathlib import Path

from psa_jax.errors import PSAError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?=/)")
_IN_A_BUCKET = re.compile(r"(gs|s3)://([^/]*)/*(.*)", re.DOTALL)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


@dataclasses.dataclass(frozen=True)
class Address:
    """A place in a bucket: an object, or all objects whose names begin with the key and a slash.

    Attributes:
      scheme: gs or s3.
      bucket: its name.
      key: without slashes at its ends; never empty.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key, as a file or a folder would be named."""
        return self.key.rpartition("/")[2]


class Source(Address):
    """An address whose content the command line copies to this machine before the command runs."""


def address_or_none(text: str) -> Address | None:
    """Reads an address such as gs://bucket/folder; None where the text is none of gs:// or s3://.

    Raises:
      PSAError: an address with credentials, without a bucket or a key, or with a key that is no path.
    """
    found = _IN_A_BUCKET.fullmatch(text)
    if found is None:
        return None
    scheme, bucket, key = found[1], found[2], found[3].rstrip("/")
    if "@" in bucket or ":" in bucket or "?" in text:  # not repeated: it may hold a password, or a signature
        raise PSAError(
            f"{scheme}://…: an address with credentials, a port or a query; give {scheme}://BUCKET/KEY alone: "
            "credentials and endpoint are those of the environment"
        )
    if not _BUCKET.fullmatch(bucket):
        raise PSAError(f"{text!a}: no such bucket can be; give {scheme}://BUCKET/KEY")
    if not key:
        raise PSAError(f"{text}: a whole bucket; give a folder in it, such as {scheme}://{bucket}/runs/own")
    if not key.isprintable() or "\\" in key or {"", ".", ".."} & set(key.split("/")):
        raise PSAError(f"{text!a}: the key must be a path of plain names, such as runs/own")
    return Address(scheme, bucket, key)


def local_path(text: str) -> Path:
    """Converts text to a path on this machine.

    Raises:
      PSAError: the text is empty, holds a zero byte, is not UTF-8, or is an address such as gs://bucket/x, of which
        pathlib would make a local folder.
    """
    if not text:
        raise PSAError("an empty path; give one, such as . for the folder you are in")
    address_or_none(text)  # first: one with a password is not repeated
    if "\0" in text:
        raise PSAError(f"{text!r}: a path cannot hold a zero byte")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # such bytes arrive as lone surrogates
        raise PSAError(
            f"{ascii(text)}: a path that is not UTF-8, which neither JSON nor a model card can hold; rename it"
        ) from error
    if _SCHEME.match(text):
        raise PSAError(
            f"{_shown(text)}: only paths on this machine can be used here; give one, and copy from or to there yourself"
        )
    return Path(text)


def path_or_address(text: str) -> Path | Address:
    """Converts text to an address in a bucket, or to a path on this machine.

    Raises:
      PSAError: it is neither.
    """
    address = address_or_none(text)
    if address is None and _SCHEME.match(text):
        raise PSAError(f"{_shown(text)}: only paths on this machine, gs://BUCKET/KEY and s3://BUCKET/KEY can be used")
    return address or local_path(text)


def _shown(text: str) -> str:
    """An address without what may be secret in it."""
    return re.sub(r"//[^/]*@", "//…@", ascii(text.partition("?")[0])[1:-1])


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
