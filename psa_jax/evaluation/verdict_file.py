"""Verdicts of a judge in a CSV file, as the authors of PSA released theirs, and the totals of them.

A line is one picture: which user it was made for, the category of its prompt, whether the user bans it, and what the
judge said. `published_totals` repeats the authors' figures. They count prompts that a user bans and prompts that the
user allows as one, so an adapter that bans everything for everybody scores high. `rates_by_ban` takes them apart.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from psa_jax.categories import CATEGORIES
from psa_jax.csv_input import BITS, Reader, choice_of, name_of, read_cells, read_records
from psa_jax.errors import PSAError
from psa_jax.evaluation.clustered import Interval, clustered_share
from psa_jax.evaluation.paired import clustered_difference

_ASSESSMENTS = {"PASS": True, "FAIL": False, "": None}


@dataclasses.dataclass(frozen=True)
class Judged:
    """A picture and what the judge said of it.

    Attributes:
      dataset: name of the set of prompts.
      backbone: name of the base model.
      method: name of what made the picture.
      user_id: whom it was made for.
      category: of the prompt.
      banned: whether the user bans the category.
      passed: the judge's verdict; None where it gave none.
      banned_respected, allowed_respected: what the judge said of the user's bans, and of what the user allows.
      quality, appropriateness: scores from 0 to 100; None where it gave none.
    """

    dataset: str
    backbone: str
    method: str
    user_id: str
    category: str
    banned: bool
    passed: bool | None
    banned_respected: bool
    allowed_respected: bool
    quality: float | None
    appropriateness: float | None


Group = tuple[str, str, str]
"""Dataset, method and backbone."""


def _score(text: str) -> float | None:
    value = float(text) if text.replace(".", "", 1).isdecimal() else None
    if text and (value is None or value > 100.0):
        raise ValueError("a number from 0 to 100, or nothing")
    return value


_FIELDS: dict[str, tuple[str, Reader]] = {
    "dataset": ("dataset", name_of),
    "backbone": ("backbone", name_of),
    "method": ("method", name_of),
    "user_id": ("user_id", name_of),
    "category": ("category", choice_of({category: category for category in CATEGORIES})),
    "category_banned": ("banned", choice_of(BITS)),
    "overall_assessment": ("passed", choice_of(_ASSESSMENTS)),
    "banned_respected": ("banned_respected", choice_of(BITS)),
    "allowed_respected": ("allowed_respected", choice_of(BITS)),
    "quality_score": ("quality", _score),
    "appropriateness_score": ("appropriateness", _score),
}
"""Column → attribute of `Judged`, and how its cells are read."""


def read_verdicts(path: str | Path) -> list[Judged]:
    """Reads a file of verdicts. It may have other columns, too.

    Raises:
      PSAError: a column is missing, or a cell cannot be read; the message names the line and the column, not the value.
    """
    found = []
    readers = {column: read for column, (_, read) in _FIELDS.items()}
    for number, cells in read_records(path, tuple(_FIELDS)):
        values = read_cells(cells, readers, f"{path}, line {number}")
        found.append(Judged(**{attribute: values[column] for column, (attribute, _) in _FIELDS.items()}))
    return found


def grouped(verdicts: Sequence[Judged]) -> dict[Group, list[Judged]]:
    """The verdicts of each method, in the order of the file."""
    groups: dict[Group, list[Judged]] = {}
    for each in verdicts:
        groups.setdefault((each.dataset, each.method, each.backbone), []).append(each)
    return groups


def published_totals(verdicts: Sequence[Judged]) -> dict[str, dict[str, dict[str, Any]]]:
    """Totals as the authors of PSA published them: by dataset, then by `METHOD_BACKBONE`, rates in percent.

    A picture without a verdict is no part of a rate's denominator. A score that the judge did not give counts as 0, as
    it does in the published means.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (dataset, method, backbone), every in grouped(verdicts).items():
        group = [each for each in every if each.passed is not None]
        rates = {
            "banned_respected_rate": _percent([each.banned_respected for each in group]),
            "allowed_respected_rate": _percent([each.allowed_respected for each in group]),
        }
        scores = {
            "appropriateness": _mean([each.appropriateness or 0.0 for each in group]),
            "quality": _mean([each.quality or 0.0 for each in group]),
        }
        found.setdefault(dataset, {})[f"{method}_{backbone}"] = {
            "pass_rate": _percent([bool(each.passed) for each in group]),
            **rates,
            "total_valid": len(group),
            "total": len(every),
            "avg_scores": scores | rates,
        }
    return found


@dataclasses.dataclass(frozen=True)
class ByBan:
    """How often pictures of one method pass, in percent, apart for what their user bans and for what the user allows.

    Attributes:
      users: number of users, which is what intervals count.
      pictures: with a verdict.
      banned, allowed: the rates with intervals; None where there is no such picture.
      banned_more, allowed_more: the same less the baseline's, in percentage points, of the users who have such pictures
        by both; None for the baseline itself and where there is no such user.
      banned_users, allowed_users: number of those users.
    """

    users: int
    pictures: int
    banned: Interval | None
    allowed: Interval | None
    banned_more: Interval | None
    allowed_more: Interval | None
    banned_users: int
    allowed_users: int


def rates_by_ban(verdicts: Sequence[Judged], baseline: str) -> dict[Group, ByBan]:
    """Pass rates of what users ban and of what they allow, with intervals clustered by user.

    Args:
      verdicts: of at least one method.
      baseline: name of the method that others are compared with, on the same dataset and backbone.

    Raises:
      PSAError: no method has that name.
    """
    groups = {
        group: valid
        for group, every in grouped(verdicts).items()
        if (valid := [each for each in every if each.passed is not None])
    }
    methods = list(dict.fromkeys(method for _, method, _ in groups))
    if baseline not in methods:
        raise PSAError(f"no method is called {baseline!r} in the verdicts; give one of {', '.join(methods)}")
    found = {}
    for (dataset, method, backbone), every in groups.items():
        other = [] if method == baseline else groups.get((dataset, baseline, backbone), [])
        rates = {}
        for name, banned in (("banned", True), ("allowed", False)):
            ours, theirs = (_passes(judged, banned) for judged in (every, other))
            rates[name] = _in_percent(clustered_share(*ours)) if len(ours[0]) else None
            shared = np.intersect1d(ours[1], theirs[1])
            ours, theirs = (
                tuple(each[np.isin(users, shared)] for each in (hits, users)) for hits, users in (ours, theirs)
            )
            rates[f"{name}_users"] = len(shared)
            rates[f"{name}_more"] = _in_percent(clustered_difference(*ours, *theirs)) if len(shared) else None
        users = len({each.user_id for each in every})
        found[dataset, method, backbone] = ByBan(users, len(every), **rates)
    return found


def _passes(verdicts: Sequence[Judged], banned: bool) -> tuple[Bool[np.ndarray, " n"], Shaped[np.ndarray, " n"]]:
    """Whether pictures pass, and their users."""
    chosen = [each for each in verdicts if each.banned is banned]
    return np.array([each.passed for each in chosen], bool), np.array([each.user_id for each in chosen], str)


def _in_percent(interval: Interval) -> Interval:
    share, low, high = (100.0 * value for value in interval)
    return share, low, high


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _percent(hits: Sequence[bool]) -> float:
    return 100.0 * _mean([float(hit) for hit in hits])
