"""safetensors files: a checked header, and tensors as float32.

Imports neither JAX nor torch nor ml_dtypes, so that all of them refuse the same files. The safetensors library checks
that a file is complete, but keeps the last of two tensors of one name and reads neither bfloat16 nor float8 into numpy;
this module handles these cases.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from psa_jax.errors import PSAError
from psa_jax.files import replacing
from psa_jax.json_input import parse_json

MAX_NAME = 300
MAX_HEADER = 100 << 20  # safetensors' own bound
_METADATA = "__metadata__"
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

_BITS = {
    "float64": (np.uint64, 0x7FF0 << 48),
    "float32": (np.uint32, 0x7F80 << 16),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
_PIECE = 1 << 16  # numbers at a time, which fit a processor's cache


class Entry(NamedTuple):
    """Place of a tensor in its file.

    Attributes:
      dtype: safetensors' name, such as "BF16".
      shape: its shape.
      start: offset of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int


class Header(NamedTuple):
    """Header of a file.

    Attributes:
      metadata: texts by key.
      tensors: the tensors' places by name.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, Entry]


def read_header(path: Path) -> Header:
    """Reads the header of a safetensors file, and no tensor.

    Raises:
      PSAError: the file is missing or incomplete, or two tensors or metadata keys have the same name.
    """
    if not Path(path).is_file():
        raise PSAError(f"{path}: file not found; check the path")
    try:
        with safe_open(path, framework="numpy"):  # checks types, offsets and file length
            pass
        with Path(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]  # it may quote the file
        raise PSAError(f"{path}: not a whole safetensors file ({reason}); get it again") from error
    entries = parse_json(text, f"{path}: its header", limit=MAX_HEADER)
    metadata = entries.pop(_METADATA, None) or {}
    for name in entries:
        if not name.isprintable() or len(name) > MAX_NAME:
            raise PSAError(f"{path}: a tensor is named {name[:40]!r}: no name that a model has; get the file again")
    return Header(
        metadata,
        {
            name: Entry(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
        },
    )


def require_floats(path: Path, name: str, dtype: str) -> None:
    """Checks that a tensor has a dtype in which weights are read: float64, float32, float16 or bfloat16.

    Raises:
      PSAError: it holds integers, booleans, complex numbers, or floats of 8 or fewer bits, whose scales are elsewhere.
    """
    if dtype not in _FLOATS:
        raise PSAError(
            f"{path}: {name} is of dtype {dtype} (supported: {', '.join(_FLOATS)}); "
            "give the file with its weights in one of these"
        )


def read_float32(path: Path, name: str, entry: Entry, *, finite: bool = True) -> np.ndarray:
    """Reads a tensor as float32.

    Args:
      path: the file.
      name: of the tensor, for errors.
      entry: its place, of `read_header`.
      finite: refuses NaN and infinities.

    Returns:
      A new array.

    Raises:
      PSAError: the dtype is not supported, there are no numbers or too many axes, or a number is not finite in float32.
    """
    require_floats(path, name, entry.dtype)
    size = int(np.prod(entry.shape, dtype=object))
    if not size:
        raise PSAError(f"{path}: {name} has shape {entry.shape} and so no numbers; the file is damaged, get it again")
    raw = np.fromfile(path, _FLOATS[entry.dtype], size, offset=entry.start)
    if entry.dtype == "BF16":  # the upper half of a float32
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):  # larger than float32: infinite, refused below
        values = raw.astype(np.float32, copy=False)
    if finite:
        require_finite(path, name, values)
    try:
        return values.reshape(entry.shape)
    except ValueError as error:  # numpy has at most 64 axes
        raise PSAError(f"{path}: {name} has {len(entry.shape)} axes; the file is damaged, get it again") from error


def require_finite(where: Path, name: str, values: np.ndarray) -> None:
    """Checks that a tensor has neither NaN nor infinities.

    Raises:
      PSAError: a number is not finite.
    """
    if not all_finite(values):
        raise PSAError(
            f"{where}: {name} has values that are not finite in {values.dtype.name}; "
            "the file is damaged or was made by a training that failed"
        )


def all_finite(values: np.ndarray) -> bool:
    """Whether every number is finite, that is, no exponent has all bits set.

    `np.isfinite` would take ten times as long in float16 and allocate a boolean for every number.
    """
    unsigned, infinity = _BITS[values.dtype.name]
    flat = values.ravel(order="K")  # copies only a non-contiguous array
    bits = flat.view(unsigned)
    sign = unsigned(1 << (8 * values.itemsize - 1))
    return all((bits[start : start + _PIECE] & ~sign).max() < infinity for start in range(0, bits.size, _PIECE))


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file, completely or not at all, readable for whomever the umask allows.

    Args:
      tensors: arrays by name.
      path: the file; its folder is made where it is missing.
      metadata: texts for the header.

    Raises:
      PSAError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata)
