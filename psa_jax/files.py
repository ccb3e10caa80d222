"""Files and folders that are written completely or not at all. Imports nothing heavy.

Who may read a file follows one rule, by whether its content is about a person:

- Profiles, embeddings, bans of users (also of unnamed ones), and weights into which one user was baked: their owner
  alone (`write_private`, `mode=PRIVATE`, and whatever is written inside `owner_only`).
- Weights of adapters and base models, configurations, cards and other pictures: whoever the umask allows (the default).
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from psa_jax.errors import PSAError

PRIVATE = 0o600
"""The mode of a file for its owner alone."""

PUBLIC = 0o666
"""The mode of a file for everyone whom the umask allows."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Of a disk, of an owner's share of it, of one file."""


@contextlib.contextmanager
def replacing(path: str | Path, mode: int = PUBLIC) -> Iterator[Path]:
    """Context for a writer that needs a path: the file replaces `path` when the block succeeds.

    If the block raises, `path` stays as it was and nothing is left beside it. A symbolic link at `path` is replaced,
    not followed.

    Args:
      path: the file to write, in an existing folder.
      mode: its permissions, from the first byte on; the umask takes away from them.

    Yields:
      An empty temporary file beside `path`, to be overwritten or replaced.

    Raises:
      PSAError: the folder does not exist or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        try:
            allowed = temporary.stat().st_mode & 0o777
            yield temporary
            with open(temporary, "rb") as file:
                os.fchmod(file.fileno(), allowed)  # a library may have put a file of its own mode in its place
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        advice = "make room and run again" if error.errno in _NO_ROOM else "choose a file in an existing folder"
        raise PSAError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error


def write(path: str | Path, content: bytes | str, mode: int = PUBLIC) -> None:
    """Writes a file completely or not at all.

    Args:
      path: the file, in an existing folder; what it holds is replaced.
      content: bytes, or text that is written in UTF-8 as it is.
      mode: its permissions; the umask takes away from them.

    Raises:
      PSAError: the folder does not exist or the file cannot be written; what was there is unchanged.
    """
    with replacing(path, mode) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_private(path: str | Path, content: bytes | str) -> None:
    """`write` with mode 0600: the content is never readable by others, not even for a moment.

    Args:
      path: the file, in an existing folder.
      content: bytes, or text that is written in UTF-8.

    Raises:
      PSAError: the folder does not exist or the file cannot be written.
    """
    write(path, content, PRIVATE)


@contextlib.contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """Context for writing a folder: it gets the name `out` when the block succeeds.

    If the block raises, nothing is left. What a killed process left of an earlier attempt is removed first.

    Args:
      out: the folder to make: absent or empty.

    Yields:
      A temporary name beside `out`, not there yet; the block makes the folder, and its parents where they are missing.
    """
    unfinished = out.with_name(f".{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        os.rename(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def owner_only() -> Iterator[None]:
    """Context in which new files and folders are their owner's alone (umask 077, of the whole process)."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def check_new(path: str | Path, advice: str = "give another name, or remove it first") -> None:
    """Refuses a path that something already has, so that a mistyped name destroys nothing.

    Args:
      path: where something is going to be written.
      advice: the end of the error message: what the user can do.

    Raises:
      PSAError: the path exists, be it as a link to nothing.
    """
    if os.path.lexists(path):
        raise PSAError(f"{path}: exists already; {advice}")


def read_bytes(path: str | Path) -> bytes:
    """Content of a file.

    Raises:
      PSAError: it is missing or unreadable.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PSAError(f"{path}: cannot be read ({error.strerror}); check the path") from error
