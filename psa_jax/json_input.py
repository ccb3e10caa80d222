"""Strict JSON reader with limits on size and depth. Imports only the standard library.

Files come from other people. Python's own reader keeps the last of two equal keys, accepts NaN and raises
RecursionError on deep nesting, how deep depends on its version; here each of these is an error of one line.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError

MAX_BYTES = 16 << 20
"""Largest file. The largest real ones, tokenizers of language models, have 11 MB."""
MAX_DEPTH = 100
"""Deepest nesting of lists and objects. Configurations have under 10 levels."""
MAX_DIGITS = 1000

_BOM = b"\xef\xbb\xbf"
_NAMES = {dict: "object", list: "list"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # also one that is not closed
_BRACKET = re.compile(r"[\[\]{}]")


class _Refused(ValueError):
    """The reason why a text is not valid JSON, for the parentheses of the message."""


def read_json(
    path: Path,
    kind: type | None = dict,
    *,
    limit: int = MAX_BYTES,
    bom: bool = False,
    constants: bool = False,
    hint: str = "check the path",
) -> Any:
    """Reads a JSON file.

    Args:
      path: a file in UTF-8.
      kind: required type of the value, `dict` or `list`; None accepts any.
      limit: largest size in bytes.
      bom: accepts a byte order mark at the start, which diffusers, transformers and safetensors refuse.
      constants: accepts NaN and infinities, which diffusers writes in scheduler configurations.
      hint: advice in the error for a missing file.

    Returns:
      The value.

    Raises:
      PSAError: the file is missing or too large, or `parse_json` refuses its text.
    """
    try:
        if not path.is_file():
            raise PSAError(f"{path}: file not found; {hint}")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise PSAError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from error
    return parse_json(content, str(path), kind, limit=limit, bom=bom, constants=constants)


def parse_json(
    text: str | bytes,
    where: str,
    kind: type | None = dict,
    *,
    limit: int = MAX_BYTES,
    bom: bool = False,
    constants: bool = False,
    quote: bool = True,
) -> Any:
    """Parses JSON text.

    Args:
      text: the text, or its bytes in UTF-8.
      where: the file, or the part of it, for errors.
      kind: required type of the value, `dict` or `list`; None accepts any.
      limit: largest size in bytes.
      bom: accepts a byte order mark at the start.
      constants: accepts NaN and infinities.
      quote: whether an error may quote the text; False for text about a person.

    Returns:
      The value.

    Raises:
      PSAError: the text is not UTF-8, not JSON, too large or nested too deep, the value has another type, an object has
        a key twice, a number is not a finite float, or a string has a lone surrogate.
    """
    try:
        if len(text) > limit:
            raise _Refused(f"it is larger than {limit:,} bytes")
        text = _decoded(text, bom)
        _check_depth(text)
        value = json.loads(text, **_hooks(constants, quote))
        if _SURROGATE.search(text):
            _check_surrogates(value)
    except ValueError as error:  # also json.JSONDecodeError
        raise PSAError(f"{where}: not valid JSON ({error})") from error
    if kind is not None and not isinstance(value, kind):
        raise PSAError(f"{where}: expected a JSON {_NAMES[kind]}, found {_describe(value, quote)}")
    return value


@functools.cache
def _hooks(constants: bool, quote: bool) -> dict[str, Callable[[Any], Any]]:
    """Arguments of `json.loads`: refuse a key that is given twice and numbers that are not in JSON or in a float.

    Args:
      constants, quote: as for `parse_json`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise _Refused(f"the key {key[:60]!r} is given twice" if quote else "a key is given twice")
            made[key] = value
        return made

    def constant(name: str) -> float:
        if constants:
            return float(name)
        raise _Refused(f"it holds {name}, which is no JSON value")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else constant(f"{digits[:20] if quote else 'a number'} (beyond a float)")

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise _Refused(f"a number of {len(digits):,} digits")
        return int(digits)

    hooks = {"object_pairs_hook": unique, "parse_constant": constant, "parse_int": whole}
    return hooks if constants else hooks | {"parse_float": number}


def _decoded(text: str | bytes, bom: bool) -> str:
    if isinstance(text, str):
        start = text.startswith("\ufeff")
        text = text[1:] if start else text
    else:
        start = text.startswith(_BOM)
        try:
            text = text.removeprefix(_BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Refused(f"byte {error.start} is not UTF-8; save it as UTF-8") from error
    if start and not bom:
        raise _Refused("it starts with a byte order mark; save it as UTF-8 without one")
    return text


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    brackets = _BRACKET.findall(_STRING.sub("", text))
    if max(itertools.accumulate(1 if each in "[{" else -1 for each in brackets), default=0) > MAX_DEPTH:
        raise _Refused(f"nested deeper than {MAX_DEPTH} levels")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _Refused("half a character (a lone surrogate); write it as valid Unicode") from None


def _describe(value: Any, quote: bool) -> str:
    if type(value) in _NAMES:
        return f"a{'n' if isinstance(value, dict) else ''} {_NAMES[type(value)]}"
    return repr(value)[:40] if quote else f"a value of type {type(value).__name__}"
