"""Safe reader of files of `torch.save`, zip or older: arrays, without torch and without executing the pickle.

A pickle is a program. It is interpreted here opcode by opcode, with the opcodes that a state dict needs: numbers, text,
tuples, lists, dicts, and three names, which stand for values made here and never for code. Every other opcode or name
is refused. Sizes are bounded by the file's size: compressed, overlapping and repeated content is refused.

Source: https://docs.pytorch.org/docs/stable/notes/serialization.html
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from psa_jax.errors import PSAError

MAX_PICKLE_BYTES = 16 << 20
MAX_ENTRIES = 20_000
MAX_BYTES = 16 << 30
MAX_AXES = 8

_STORAGES = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch DoubleStorage": np.dtype("<f8"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = {"torch LongStorage": np.dtype("<i8")}
# The first two pickles of a file from before torch 1.6: its mark, and the version of the format.
_OLD = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19." + b"\x80\x02M\xe9\x03."
_OF_A_LIST = {"PROTO", "EMPTY_LIST", "BINPUT", "LONG_BINPUT", "MARK", "BINUNICODE", "APPEND", "APPENDS", "STOP"}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_MARK = object()
# Exceptions of zipfile and pickletools on damaged files.
_DAMAGED = (zipfile.BadZipFile, struct.error, EOFError, ValueError, KeyError, IndexError, RuntimeError, OSError)


class _Name(str):
    """A global name in the pickle. It is a plain text; `_call` decides what it stands for."""


class _Storage(NamedTuple):
    values: np.ndarray


class _Refused(Exception):
    """Reason of a refusal. `read_state` adds the file and the advice."""


def read_state(path: Path, *, integers: bool = False) -> dict[str, Any]:
    """State dict in a file of `torch.save`: names to tensors, or to dicts of tensors.

    Args:
      path: the file.
      integers: also reads tensors of integers, such as counters of batches.

    Raises:
      PSAError: another content, or a damaged, oversized or malicious file. Nothing in it is executed.
    """
    if not path.is_file():
        raise PSAError(f"{path}: no such file")
    dtypes, size = _STORAGES | (_INTEGERS if integers else {}), path.stat().st_size
    try:
        with path.open("rb") as file:
            if file.read(len(_OLD)) == _OLD:
                return _plain(_read_old(file, size, dtypes))
        with zipfile.ZipFile(path) as archive:
            program, load = _open(archive, size)
            return _plain(_interpret(io.BytesIO(program), _Storages(dtypes, load), size))
    except _Refused as refusal:
        raise PSAError(f"{path}: refused, nothing in it was run: {refusal}; use only files you trust") from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PSAError(
            f"{path}: not a whole file of torch.save ({reason}); get it again, or save it again with torch.save"
        ) from error


_Load = Callable[[str, np.dtype, int], np.ndarray]
"""(key, dtype, count) → the numbers of a storage."""


class _Storages:
    """Storages of a file: the raw numbers beside the pickle. Each is read once.

    Args:
      dtypes: of the storages that may occur, by their name.
      load: reads one.
    """

    def __init__(self, dtypes: Mapping[str, np.dtype], load: _Load):
        self.dtypes, self._load, self._read = dtypes, load, {}

    def get(self, pid: Any) -> _Storage:
        """Storage of the persistent id ("storage", class, key, device, count); older files add None, for "no view"."""
        if isinstance(pid, tuple) and len(pid) == 6 and pid[5] is None:
            pid = pid[:5]
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or type(pid[1]) is not _Name:
            raise _Refused("a persistent id that names no storage")
        _, storage_class, key, _, count = pid
        if storage_class not in self.dtypes or type(key) is not str or not key.isdecimal() or type(count) is not int:
            raise _Refused("a persistent id that names no storage of numbers that are read here")
        if key not in self._read:
            self._read[key] = storage_class, _Storage(self._load(key, self.dtypes[storage_class], count))
        known, storage = self._read[key]
        if known != storage_class or len(storage.values) != count:
            raise _Refused(f"storage {key} is used as two different ones")
        return storage


def _open(archive: zipfile.ZipFile, size: int) -> tuple[bytes, _Load]:
    """The pickle, and what loads its storages."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(names) > MAX_ENTRIES or len(set(names)) != len(names):
        raise _Refused(f"{len(names)} entries, or one twice")
    prefix = names[0].partition("/")[0] if names else ""
    for entry in entries:
        parts = entry.filename.split("/")
        if len(parts) < 2 or parts[0] != prefix or {"", ".", ".."} & set(parts) or "\\" in entry.filename:
            raise _Refused(f"an entry is named {entry.filename[:80]!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise _Refused(f"{entry.filename[:80]!r} is compressed or encrypted, which torch never does")
    if sum(entry.file_size for entry in entries) > size or size > MAX_BYTES:
        raise _Refused("it claims to be larger than it is, or is larger than any state dict")
    if archive.getinfo(f"{prefix}/data.pkl").file_size > MAX_PICKLE_BYTES:
        raise _Refused("its pickle is larger than any state dict's")
    if f"{prefix}/byteorder" in names and archive.read(f"{prefix}/byteorder") != b"little":
        raise _Refused("its numbers are big-endian")

    def load(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        content = archive.read(f"{prefix}/data/{key}")
        if len(content) != count * dtype.itemsize:
            raise _Refused(f"storage {key} has {len(content)} bytes, {count} numbers are announced")
        return np.frombuffer(content, dtype)

    return archive.read(f"{prefix}/data.pkl"), load


def _read_old(file: io.BufferedReader, size: int, dtypes: Mapping[str, np.dtype]) -> Any:
    """What a file from before torch 1.6 holds: pickles of the system, of the state and of the storages' keys, then the
    storages in this order, each after its length. Their types are in the state, which is therefore interpreted twice.

    Args:
      file: after the bytes `_OLD`.
      size: of the file, in bytes.
      dtypes: of the storages that may occur, by their name.
    """
    if size > MAX_BYTES:
        raise _Refused("it is larger than any state dict")
    head, announced = io.BytesIO(file.read(MAX_PICKLE_BYTES)), dict[str, tuple[np.dtype, int]]()
    left = size

    def announce(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        nonlocal left
        if count < 0 or len(announced) == MAX_ENTRIES:
            raise _Refused(f"storage {key} announces {count} numbers, or is one of more than {MAX_ENTRIES}")
        announced[key] = dtype, count
        left -= count * dtype.itemsize
        if left < 0:
            raise EOFError(f"storage {key} announces {count} numbers, more than the file has")
        return np.zeros(count, dtype)

    system = _interpret(head, _Storages({}, announce), 0)  # which has no storages
    if type(system) is not dict or system.get("little_endian") is not True:
        raise _Refused("its numbers are big-endian")
    start = head.tell()
    _interpret(head, _Storages(dtypes, announce), size)
    keys = _texts(head)
    if len(set(keys)) != len(keys) or set(keys) != announced.keys():
        raise _Refused("it lists other storages than it uses")
    file.seek(len(_OLD) + head.tell())
    found: dict[str, np.ndarray] = {}
    for key in keys:
        dtype, count = announced[key]
        length, content = file.read(8), file.read(count * dtype.itemsize)
        if len(length) + len(content) != 8 + count * dtype.itemsize:
            raise EOFError(f"storage {key} ends early")
        if int.from_bytes(length, "little") != count:
            raise _Refused(f"storage {key} has another length than the {count} numbers that are announced")
        found[key] = np.frombuffer(content, dtype)
    if file.read(1):
        raise _Refused("it goes on behind its end")
    head.seek(start)
    return _interpret(head, _Storages(dtypes, lambda key, dtype, count: found[key]), size)


def _texts(program: io.BytesIO) -> list[str]:
    """The list of texts that a pickle describes."""
    found = []
    for opcode, value, _ in pickletools.genops(program):
        if opcode.name not in _OF_A_LIST:
            raise _Refused(f"its list of storages uses {opcode.name}")
        if opcode.name == "BINUNICODE":
            found.append(value)
    return found


def _interpret(program: io.BytesIO, storages: _Storages, budget: int) -> Any:
    """What the next pickle describes. Tensors take their bytes from `budget`: views of one storage must not pile up."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop() -> Any:
        if not stack or stack[-1] is _MARK:
            raise _Refused("its pickle takes more than it has put")
        return stack.pop()

    def pop_to_mark() -> list[Any]:
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise _Refused("its pickle takes more than it has put")

    for opcode, value, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO":
                if value != 2:
                    raise _Refused(f"pickle protocol {value}; torch.save writes 2")
            case "STOP":
                result = pop()
                if stack:
                    raise _Refused("its pickle leaves something over")
                return result
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(value)
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(opcode.name[-1]))]
                stack.append(tuple(reversed(items)))
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "SETITEM":
                item, key = pop(), pop()
                _fill(stack[-1], [key, item])
            case "SETITEMS":
                items = pop_to_mark()
                _fill(stack[-1], items)
            case "GLOBAL":
                if value not in (_DICT, _TENSOR, _PARAMETER, *storages.dtypes):
                    raise _Refused(f"its pickle asks for {value[:80]!r}, which no state dict needs")
                stack.append(_Name(value))
            case "BINPERSID":
                stack.append(storages.get(pop()))
            case "REDUCE":
                given, name = pop(), pop()
                made = _call(name, given)
                if type(made) is np.ndarray and name == _TENSOR:
                    budget -= made.nbytes
                    if budget < 0:
                        raise _Refused("its tensors repeat each other's numbers until they are larger than the file")
                stack.append(made)
            case "BUILD":  # torch adds `_metadata` (versions of modules) to a state dict
                attributes = pop()
                if type(attributes) is not dict or attributes.keys() != {"_metadata"} or type(stack[-1]) is not dict:
                    raise _Refused("its pickle sets attributes")
            case other:
                raise _Refused(f"its pickle uses {other}, which no state dict needs")
    raise _Refused("its pickle has no end")


def _fill(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise _Refused("its pickle fills something that is no dict")
    for key, item in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise _Refused("its pickle has a dict with keys that are no names")
        if key in target:
            raise _Refused(f"its pickle has two entries named {key[:80]!r}")
        target[key] = item


def _call(name: Any, given: Any) -> Any:
    """Result of a call of `name` in a state dict, built here from checked arguments."""
    if type(name) is not _Name or type(given) is not tuple:
        raise _Refused("its pickle calls something that it made itself")
    if name == _DICT and given == ():
        return {}
    if name == _PARAMETER and len(given) == 3 and type(given[0]) is np.ndarray:
        return given[0]
    if name == _TENSOR and len(given) in (6, 7) and type(given[0]) is _Storage:
        return _tensor(given[0].values, *given[1:4])
    raise _Refused(f"its pickle calls {name!r} with arguments that torch does not give it")


def _tensor(values: np.ndarray, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """Copy of a strided view of a storage, after a check that the view lies within it."""
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise _Refused("a tensor with a shape and strides that do not go together")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (offset, *shape, *strides)):
        raise _Refused("a tensor with a negative or huge offset, size or stride")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > len(values) or (math.prod(shape) and last >= len(values)):
        raise _Refused("a tensor that reaches out of its storage")
    if not math.prod(shape):
        return np.empty(shape, values.dtype)
    view = np.lib.stride_tricks.as_strided(
        values[offset:], shape, [step * values.itemsize for step in strides], writeable=False
    )
    return np.array(view, order="C")


def _plain(found: Any) -> dict[str, Any]:
    """The state dict, after a check that it holds tensors and dicts of tensors, and nothing deeper."""
    if type(found) is not dict:
        raise _Refused(f"it holds a {type(found).__name__} and no dict of tensors")
    for name, item in found.items():
        inner = item if type(item) is dict else {name: item}
        if not all(type(tensor) is np.ndarray for tensor in inner.values()):
            raise _Refused(f"{name[:80]!r} is neither a tensor nor a dict of tensors")
    return found
