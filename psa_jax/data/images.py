"""Reads pictures of users: JPEG or PNG by content, of limited size, complete. Everything else is refused.

`open_image` returns the pixels; `survey` decodes many pictures on all cores and keeps none of them. The pixels are
those that Pillow shows: upright as the file's EXIF or XMP data say, the first picture of a JPEG with several (phones
add a depth or brightness map), colour profiles not applied, bytes behind the end of the picture ignored.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import stat
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from psa_jax.errors import PSAError

MAX_PIXELS = 1 << 26
"""Largest picture that is decoded, in pixels (8192 x 8192)."""
MAX_BYTES = 1 << 28
"""Largest file that is opened, in bytes: more than MAX_PIXELS need in any format that is read here."""

_FORMATS = ("JPEG", "PNG")
_MPO = "MPO"  # several JPEGs in one file, which Pillow's JPEG reader hands over
# Modes that convert to RGB without loss. Alpha and 16-bit greys do not: both would be cut off silently.
_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr")
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# Exceptions of Pillow for damaged files; which one depends on the format and on the place of the damage.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError)
# EXIF's numbers for the eight orientations; any other value, or none, means upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# First bytes of other formats: files are often renamed to .jpg or .png.
_OTHERS = {
    "WebP": rb"RIFF....WEBP",
    "GIF": rb"GIF8",
    "TIFF": rb"II\*\0|MM\0\*",
    "BMP": rb"BM",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(?:hei[cfmsx]|hev[cmsx]|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
}
# A JPEG's markers; in coded data 0xFF is followed by 0, and a restart marker ends nothing.
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_BEGIN, _END, _BARE = 0xD8, 0xD9, 0x01
_CHUNK = 32  # pictures in a task: enough to hide the cost of distributing tasks


class Surveyed(NamedTuple):
    """The result of decoding a picture.

    Args:
      size: (height, width), in pixels; None if the picture was refused.
      problem: why it was refused, without its path; None if it was not.
    """

    size: tuple[int, int] | None
    problem: str | None


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG or PNG (by content, not by name) to upright RGB.

    The size is checked before any pixel is decoded.

    Args:
      path: the file.
      max_pixels: the most pixels that are accepted.

    Raises:
      PSAError: another format, too large, alpha or 16 bits, an animation, missing, truncated or damaged.
    """
    with _opened(Path(path), max_pixels) as image:
        return np.array(_upright(path, image).convert("RGB"))


def image_size(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width), in pixels, of a picture that `open_image` accepts; it is decoded to find damage.

    Args:
      path: the file.
      max_pixels: the most pixels that are accepted.

    Raises:
      PSAError: as in `open_image`.
    """
    with _opened(Path(path), max_pixels) as image:
        image = _upright(path, image)
        if image.mode != "RGB":  # saves the copy that convert makes
            image.convert("RGB")
        return image.height, image.width


def survey(paths: Sequence[Path], processes: int | None = None) -> Iterator[Surveyed]:
    """Decodes every picture and yields its size or its problem, in order.

    Args:
      paths: the pictures.
      processes: for decoding; None takes one a core, 1 stays in this process.

    Raises:
      PSAError: fewer than one process, or one died (a picture that crashes the decoder, or no memory left).
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
    done = 0
    try:
        for found in pool.map(_survey_chunk, chunks):
            yield from found
            done += len(found)
    except BrokenProcessPool as error:
        raise PSAError(
            f"a process that decodes pictures died, at {paths[done]} or up to {processes * _CHUNK} pictures after it; "
            "restore the one that no program opens, or, where memory was short, give --processes=1"
        ) from error
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
    """Context with an image that may be decoded; errors inside become a PSAError that begins with `path`."""
    try:
        info = path.stat()
        # A named pipe or device would block or never end.
        if not stat.S_ISREG(info.st_mode):
            raise PSAError(f"{path}: not a regular file; give a JPEG or PNG picture")
        if not 0 < info.st_size <= MAX_BYTES:
            raise PSAError(f"{path}: {info.st_size} bytes, allowed are 1 to {MAX_BYTES}; restore the picture")
        with Image.open(path, formats=_FORMATS) as image:
            if image.format == "PNG" and image.is_animated:
                raise PSAError(f"{path}: holds several pictures; give a JPEG or PNG of one")
            width, height = image.size
            if width * height > max_pixels:
                raise PSAError(f"{path}: {width} x {height} pixels, the limit is {max_pixels} in all; scale it down")
            if image.mode not in _MODES or "transparency" in image.info:
                raise PSAError(f"{path}: pixel format {image.mode} with alpha or over 8 bits; save it as 8-bit RGB")
            if image.format in ("JPEG", _MPO) and not _is_ended(path.read_bytes()):
                raise PSAError(f"{path}: the end of the JPEG is missing; restore the picture")
            yield image
    except PSAError:
        raise
    except FileNotFoundError as error:
        raise PSAError(f"{path}: picture is missing; restore it or remove its rows") from error
    except UnidentifiedImageError as error:
        raise PSAError(f"{path}: {_other_format(path)}") from error
    except _TOO_LARGE as error:
        raise PSAError(f"{path}: far more pixels than the limit of {max_pixels} in all; scale it down") from error
    except _DAMAGE as error:
        raise PSAError(f"{path}: picture cannot be decoded ({error}); restore it") from error


def _upright(path: Path, image: Image.Image) -> Image.Image:
    """The decoded picture, rotated as its EXIF or XMP data say. In a PNG they may come after the pixels."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (*_DAMAGE, KeyError, TypeError, struct.error) as error:
        raise PSAError(
            f"{path}: EXIF data cannot be read ({error}), so nobody knows which way is up; save it without them"
        ) from error
    method = _UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _is_ended(content: bytes) -> bool:
    """Whether a JPEG has its own end marker. Zeros, which pad a file whose copy failed, may decode as pixels.

    Markers inside segments do not count (EXIF data hold a small picture of their own), nor does anything behind the
    end: cameras add padding, phones a film or another picture.
    """
    place = 2
    while found := _MARKER.search(content, place):
        marker = found[1][0]
        if marker in (_BEGIN, _END):
            return marker == _END
        place = found.end()
        if marker != _BARE:
            place += int.from_bytes(content[place : place + 2], "big")
    return False


def _other_format(path: Path) -> str:
    with open(path, "rb") as file:
        begin = file.read(16)
    for name, pattern in _OTHERS.items():
        if re.match(pattern, begin, re.DOTALL):
            how = "ImageOps.exif_transpose(Image.open(FILE)).convert('RGB').save(OTHER, 'PNG')"
            return f"content is {name}, neither JPEG nor PNG; save it as one of them, with Pillow: {how}"
    return "content is neither JPEG nor PNG; restore the picture"
