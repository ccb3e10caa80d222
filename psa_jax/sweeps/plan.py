"""The points of a sweep: products and zips of generators, a name for each, and the record of them all."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.json_input import read_json
from psa_jax.rules import quoted

Overrides = dict[str, str]
"""Key → value as text, as in --config.KEY=VALUE."""
PLAN_FILE = "sweep.json"
"""In the folder of a sweep: every point that was ever asked for there."""
LOG_FILE = "log.txt"
"""In the folder of a point: what its training printed."""

_LONGEST = 120
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


@dataclasses.dataclass(frozen=True)
class Point:
    """One training of a sweep.

    Attributes:
      overrides: what it changes in the configuration.
    """

    overrides: Overrides

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def name(self) -> str:
        """Of its folder: the last part of each key and the value, such as beta=30.0,seed=1.

        It depends on this point alone, so that a sweep can be made larger. A key is written whole where two of the
        point's keys end alike. What a file name may not hold becomes a hyphen; of a path only its end is named.
        """
        ends = [key.rpartition(".")[2] for key in self.overrides]
        name = ",".join(
            f"{key if ends.count(end) > 1 else end}={_file_name(text)}"
            for (key, text), end in zip(self.overrides.items(), ends, strict=True)
        )
        return name if len(name) <= _LONGEST else f"{name[:_LONGEST]}-{_digest(name)}"

    @property
    def label(self) -> str:
        """For schedulers, whose names are labels of DNS: at most 28 letters, digits and hyphens."""
        words = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"{words[:21].strip('-')}-{_digest(self.name)[:6]}"


def _file_name(text: str) -> str:
    if not _UNSAFE.search(text):
        return text
    return _UNSAFE.sub("-", text.rstrip("/").rpartition("/")[2]).strip("-.")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def points_of(expression: str, read: Callable[[str], Sequence[Mapping[str, Any]]]) -> list[Point]:
    """All points of an expression: `a,b` is every value of a with every value of b, `a+b` goes through both at once.

    Args:
      expression: names of generators; empty for the one without a name.
      read: name → what the generator yields.

    Returns:
      The points, the last generator fastest.

    Raises:
      PSAError: no name or a name twice, a zip of different lengths, a key that two generators set, or two points of
        one name.
    """
    terms = [term.split("+") for term in expression.split(",")]
    names = [name for term in terms for name in term]
    if expression and not all(names):
        raise PSAError(f"--sweep={expression}: a name is empty; write such as beta,seed or beta+learning_rate")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PSAError(f"--sweep={expression}: {twice} is named twice; name each generator once")
    values = {name: read(name) for name in names}
    axes = [_zipped(term, values) for term in terms]
    points = [Point(_joined(choice, expression)) for choice in itertools.product(*axes)]
    require_names(points)
    return points


def _zipped(term: Sequence[str], values: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    lengths = {name: len(values[name]) for name in term}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise PSAError(f"--sweep={'+'.join(term)}: {counts} values; + wants as many of each, a comma takes all pairs")
    return [_joined(each, "+".join(term)) for each in zip(*(values[name] for name in term), strict=True)]


def _joined(parts: Sequence[Mapping[str, Any]], expression: str) -> dict[str, str]:
    joined: dict[str, str] = {}
    for part in parts:
        if both := sorted(joined.keys() & part.keys()):
            raise PSAError(f"--sweep={expression}: two of the generators set {both[0]}; use one of them")
        joined |= {key: str(value) for key, value in part.items()}
    return joined


def require_names(points: Sequence[Point]) -> None:
    """Raises PSAError where two points have one name, also on disks that do not tell A from a."""
    seen: dict[str, Point] = {}
    for point in points:
        other = seen.setdefault(point.name.casefold(), point)
        if other is not point:
            first, second = (quoted(_text(each.overrides)) for each in (other, point))
            raise PSAError(f"two points have the name {point.name}: {first} and {second}; give values that differ more")


def _text(overrides: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def describe(points: Sequence[Point]) -> str:
    """The plan in words, a line for each point."""
    count = "1 point" if len(points) == 1 else f"{len(points)} points"
    return "\n".join([f"{count}:", *(f"  {point.name}: {_text(point.overrides)}" for point in points)])


def record(workdir: Path, source: str, base: Sequence[tuple[str, str]], points: Sequence[Point]) -> None:
    """Adds points to the record of a sweep's folder. A record none of whose points has begun is made anew.

    Args:
      source: of the configuration.
      base: what every point changes in it.
      points: whose folders are in `workdir`.

    Raises:
      PSAError: the folder holds points of another configuration.
    """
    path = workdir / PLAN_FILE
    about = {"config": source, "overrides": dict(base)}
    known: dict[str, Overrides] = {}
    found = read_json(path) if path.exists() else {"points": {}}
    if any((workdir / name).is_dir() for name in found["points"]):
        if (found["config"], found["overrides"]) != (source, dict(base)):
            raise PSAError(
                f"{workdir}: holds a sweep of {found['config']} ({_text(found['overrides']) or 'nothing set'}), not of "
                f"{source} ({_text(dict(base)) or 'nothing set'}); give another --workdir"
            )
        known = found["points"]
    everything = known | {point.name: point.overrides for point in points}
    write(path, json.dumps(about | {"points": everything}, indent=1) + "\n")


def recorded(workdir: Path) -> dict[str, Overrides]:
    """Name → overrides of every point of a sweep's folder.

    Raises:
      PSAError: there is no sweep.
    """
    path = workdir / PLAN_FILE
    points = read_json(path, hint="give the --workdir of a psa-jax sweep").get("points")
    if not isinstance(points, dict) or not points or not all(isinstance(each, dict) for each in points.values()):
        raise PSAError(f"{path}: names no points; start the sweep again, which writes it anew")
    return points
