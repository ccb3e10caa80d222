"""Files that hold personal data: for the owner's eyes only, and whole or not there at all."""

import os
import tempfile
from pathlib import Path

from psa_jax.errors import PSAError


def write_private(path: str | Path, content: bytes) -> None:
    """Writes `content` with mode 0600, atomically: the file appears complete or stays as it was.

    Raises:
      PSAError: the folder is missing or the file cannot be written.
    """
    path = Path(path)
    try:
        # mkstemp creates with mode 0600, so the content is never readable by others, not even for a moment.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise PSAError(f"{path}: cannot be written ({error.strerror}); choose a file in an existing folder") from error


def check_new(path: str | Path, advice: str = "give another name, or remove it first") -> None:
    """Refuses to replace what is there: a name that was typed may be another file's.

    Raises:
      PSAError: something has that name, be it a link to nothing.
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
