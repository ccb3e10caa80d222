"""Pictures from outside: JPEG or PNG by content, of limited size, whole; everything else is refused.

`open_image` gives the pixels, `survey` looks at many pictures on all cores and keeps none of them.
"""

import contextlib
import multiprocessing
import os
import signal
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from psa_jax.errors import PSAError

MAX_PIXELS = 1 << 26
"""Largest picture that is decoded, in pixels (8192 x 8192)."""
MAX_BYTES = 1 << 28
"""Largest file that is opened, in bytes: more than MAX_PIXELS take in any format read here."""

_FORMATS = ("JPEG", "PNG")
# Modes that turn into RGB without loss of meaning. Alpha and 16-bit greys do not: both would be cut off in silence.
_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr")
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow raises for damaged files, by format and place of the damage.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError)
_CHUNK = 32  # pictures a task: enough to hide the cost of handing tasks out


class Surveyed(NamedTuple):
    """What is known of a picture: its (height, width), or why it was refused (without its path)."""

    size: tuple[int, int] | None
    problem: str | None


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG or PNG (by content, not by name) to RGB.

    The size is checked before any pixel is decoded; a truncated or damaged file is an error.

    Raises:
      PSAError: another format, too large, alpha or 16 bits, several pictures in one, missing or damaged.
    """
    with _opened(Path(path), max_pixels) as image:
        return np.array(image.convert("RGB"))


def image_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of a picture that `open_image` accepts: it is decoded, the pixels are dropped.

    Raises:
      PSAError: as `open_image`.
    """
    with _opened(Path(path), max_pixels) as image:
        if image.mode == "RGB":
            image.load()  # spares the copy that convert makes
        else:
            image.convert("RGB")
        return image.height, image.width


def survey(paths: Sequence[Path], processes: int | None = None) -> Iterator[Surveyed]:
    """Decodes every picture and tells what became of it, in order.

    Args:
      paths: the pictures.
      processes: how many decode; None takes one a core, 1 stays in this process.

    Raises:
      PSAError: less than one process, or one died (a picture that breaks the decoder, or no memory left).
    """
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    if processes < 1:
        raise PSAError(f"number of processes is {processes}; give 1 or more")
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    if processes == 1 or len(chunks) < 2:
        yield from map(_survey_one, paths)
        return
    # A fork would copy the locks of this process's threads (JAX has some) in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(chunks)), context, initializer=_leave_interrupts_to_the_parent)
    try:
        for found in pool.map(_survey_chunk, chunks):
            yield from found
    except BrokenProcessPool as error:
        raise PSAError("a process that decodes pictures died; run with one process to see at which picture") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _survey_chunk(paths: Sequence[Path]) -> list[Surveyed]:
    return [_survey_one(path) for path in paths]


def _survey_one(path: Path) -> Surveyed:
    try:
        return Surveyed(image_size(path), None)
    except PSAError as error:
        return Surveyed(None, str(error).removeprefix(f"{path}: "))


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """An image that may be decoded; whatever goes wrong inside the block becomes a PSAError that begins with `path`."""
    try:
        info = path.stat()
        # A named pipe or device would block or never end.
        if not stat.S_ISREG(info.st_mode):
            raise PSAError(f"{path}: not a regular file; give a JPEG or PNG picture")
        if not 0 < info.st_size <= MAX_BYTES:
            raise PSAError(f"{path}: {info.st_size} bytes, allowed are 1 to {MAX_BYTES}; restore the picture")
        with Image.open(path, formats=_FORMATS) as image:
            # Pillow's JPEG reader may hand over to another one (several pictures in one file); a PNG may be animated.
            if image.format not in _FORMATS or getattr(image, "is_animated", False):
                raise PSAError(f"{path}: holds several pictures; give a JPEG or PNG of one")
            width, height = image.size
            if width * height > max_pixels:
                raise PSAError(f"{path}: {width} x {height} pixels, the limit is {max_pixels} in all; scale it down")
            if image.mode not in _MODES or "transparency" in image.info:
                raise PSAError(f"{path}: pixel format {image.mode} with alpha or over 8 bits; save it as 8-bit RGB")
            if image.format == "JPEG" and not _is_ended(path):
                raise PSAError(f"{path}: the end of the JPEG is missing; restore the picture")
            yield image
    except PSAError:
        raise
    except FileNotFoundError as error:
        raise PSAError(f"{path}: picture is missing; restore it or remove its rows") from error
    except UnidentifiedImageError as error:
        raise PSAError(f"{path}: content is neither JPEG nor PNG; restore the picture") from error
    except _TOO_LARGE as error:
        raise PSAError(f"{path}: far more pixels than the limit of {max_pixels} in all; scale it down") from error
    except _DAMAGE as error:
        raise PSAError(f"{path}: picture cannot be decoded ({error}); restore it") from error


def _is_ended(path: Path) -> bool:
    """Whether a JPEG has its end marker. Zeros, which fill up a file whose copy failed, may decode as pixels."""
    with open(path, "rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read() == b"\xff\xd9"
