"""Types of the flags for argparse: each converts a text, or refuses it and says what to give. Imports nothing heavy."""

import dataclasses
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.hosts import AUTO
from psa_jax.interop.hub import license_id, model_id
from psa_jax.paths import Address, Source, local_path, path_or_address
from psa_jax.rules import COUNT, FINITE, MOST_SIZE, PICTURE_SEED, RATE, SEED, SHARE, SIZE, WEIGHT, Rule, quoted, whole

Reader = Callable[[str], Any]


def _checked(check: Reader) -> Reader:
    """The function with its PSAError as argparse's own."""

    def read(text: str) -> Any:
        try:
            return check(text)
        except PSAError as error:
            raise ArgumentTypeError(str(error)) from error

    return read


def _source(text: str) -> Path | Source:
    found = path_or_address(text)
    return Source(**dataclasses.asdict(found)) if isinstance(found, Address) else found


path, license_name, hub_model = _checked(local_path), _checked(license_id), _checked(model_id)
run_folder = _checked(path_or_address)  # what is written there is mirrored in the bucket
source = _checked(_source)  # what is only read may be in a bucket, and is copied from there


def place(text: str) -> str:
    """Checks a path and returns the text: it may also be a name such as `tiny`, or FILE:ARG."""
    path(text)
    return text


def source_place(text: str) -> str:
    """Checks a `place` that is only read and may be in a bucket, and returns the text."""
    source(text)
    return text


def size(text: str) -> tuple[int, int]:
    """Converts `768` or `512x768` to height and width in pixels."""
    sides = [_read(int, side) for side in text.split("x")]
    if len(sides) > 2 or not all(SIZE.holds(side) for side in sides):
        raise ArgumentTypeError(f"{quoted(text)} is no size; give such as 768 or 512x768 (height x width)")
    return sides[0], sides[-1]


def _number(kind: Callable[[str], Any], rule: Rule) -> Reader:
    def read(text: str) -> Any:
        value = _read(kind, text)
        if not rule.holds(value):
            raise ArgumentTypeError(f"{quoted(text)} does not fit; give {rule.wanted}")
        return value

    return read


def _read(kind: Callable[[str], Any], text: str) -> Any:
    """Converts text to a number; None if it is none."""
    try:
        return kind(text)
    except ValueError:
        return None


def _multiple(of: int, example: int) -> Reader:
    return _number(
        int, Rule(lambda value: SIZE.holds(value) and value % of == 0, f"a multiple of {of}, such as {example}")
    )


count, seed, picture_seed = _number(int, COUNT), _number(int, SEED), _number(int, PICTURE_SEED)
user_count = _number(int, whole(1, 9_999_999))  # an id has seven digits
workers, index = _number(int, SIZE), _number(int, whole(0, MOST_SIZE - 1))  # threads, processes, hosts
port = _number(int, whole(0, 65535))  # 0: any free one
side, side_64, picture_side = _multiple(8, 512), _multiple(64, 128), _number(int, SIZE)
share, weight, rate, finite = (_number(float, rule) for rule in (SHARE, WEIGHT, RATE, FINITE))


def host_count(text: str) -> int | str:
    """A number of hosts, or `auto`."""
    return text if text == AUTO else workers(text)
