"""The page of `psa-jax evaluate`: one self-contained HTML file with tables, intervals and pictures side by side."""

import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from psa_jax.data.images import open_image
from psa_jax.evaluation.clustered import Interval
from psa_jax.evaluation.curves import TEMPLATES, number_text, render
from psa_jax.evaluation.judged_figures import forest, level_panels
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.protocol import Verdicts
from psa_jax.files import write_private

MOST_PICTURES = 600
"""Of the page; cases that are left out are counted on it."""
SIDE = 160
"""Longer side of a picture on the page, in pixels."""

COLUMNS = {
    "content": "Content",
    "suppression": "Suppression",
    "retention": "Retention",
    "selectivity": "Selectivity",
    "clean": "Clean",
    "pass": "Pass",
    "over_refusal": "Over-refusal",
}
MEANINGS = {
    "Content": "pictures of unsafe prompts in which the judge sees something; asks no user",
    "Suppression": "prompts that their user bans: the picture lacks the content",
    "Retention": "prompts that their user allows: the picture has the content",
    "Selectivity": "suppression + retention − 100: 0 for whatever ignores the user, 100 is perfect",
    "Clean": "suppressed pictures that are intact and show nothing unsafe",
    "Pass": "without what the user bans, with what the user allows; of two pictures the one that passes wins",
    "Over-refusal": "100 − retention: what was allowed and is gone",
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the page shows pictures of.

    Attributes:
      pictures: with their paths.
      verdicts: of each judge on them.
      sees: the categories that each judge sees.
    """

    pictures: Sequence[tuple[Path, Pictured]]
    verdicts: Mapping[str, Verdicts]
    sees: Mapping[str, frozenset[str]]


def write_judged_page(path: Path, result: Mapping[str, Any], shown: Shown, command: str) -> None:
    """Writes the page, for its owner alone: it says who bans what.

    Args:
      path: the HTML file.
      result: what `result.json` holds.
      shown: the pictures.
      command: that made it.

    Raises:
      PSAError: a picture that cannot be read, or the page cannot be written.
    """
    script = (TEMPLATES / "judged.js").read_text(encoding="utf-8")
    cases, methods = _cases(shown)
    most = max(1, MOST_PICTURES // max(1, len(methods)))
    kept = _spread(list(cases), most)
    bans = _bans(shown)
    rows = [_row(key, cases[key], methods, shown, bans) for key in kept]
    text = render(
        "judged.html.j2",
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        baseline=result["baseline"],
        pictures=result["pictures"],
        judges=[_judge(name, each, result["baseline"]) for name, each in result["judges"].items()],
        measures=_measures(result["measures"], result["baseline"]),
        pairs=[_pairs(name, found) for name, found in result["pairs"].items()],
        meanings=MEANINGS,
        methods=methods,
        rows=rows,
        left_out=len(cases) - len(rows),
        choices={
            name: sorted({row[name] for row in rows} - {""}) for name in ("category", "ask", "user", "group", "level")
        },
        command=command,
        version=result["psa_jax"],
    )
    write_private(path, text)


Case = tuple[str, int, str]
"""Prompt id, seed and user."""


def _cases(shown: Shown) -> tuple[dict[Case, dict[str, int]], list[str]]:
    """For each case the number of each method's picture; and the methods."""
    cases: dict[Case, dict[str, int]] = {}
    for index, (_, each) in enumerate(shown.pictures):
        cases.setdefault((each.prompt_id, each.seed, each.user_id), {})[each.method] = index
    return cases, list(dict.fromkeys(each.method for _, each in shown.pictures))


def _spread(keys: list[Case], most: int) -> list[Case]:
    """Up to `most` of them, evenly."""
    count = min(most, len(keys))
    return [keys[index * len(keys) // count] for index in range(count)]


def _bans(shown: Shown) -> dict[str, str]:
    """For each user the categories that some line of a manifest says are banned, in words."""
    found: dict[str, set[str]] = {}
    for _, each in shown.pictures:
        if each.user_id and each.banned:
            found.setdefault(each.user_id, set()).add(each.category)
    return {user: ", ".join(sorted(banned)) for user, banned in found.items()}


def _row(
    key: Case, of_method: Mapping[str, int], methods: Sequence[str], shown: Shown, bans: Mapping[str, str]
) -> dict[str, Any]:
    first = shown.pictures[next(iter(of_method.values()))][1]
    ask = "safe" if first.unsafe is False else "" if first.banned is None else "banned" if first.banned else "allowed"
    cells = [None if method not in of_method else _cell(of_method[method], shown) for method in methods]
    return {
        "prompt": next(
            (shown.pictures[i][1].prompt for i in of_method.values() if shown.pictures[i][1].prompt), key[0]
        ),
        "category": first.category,
        "ask": ask,
        "user": first.user_id,
        "group": first.group,
        "level": first.level,
        "bans": bans.get(first.user_id, ""),
        "seed": key[1],
        "wrong": any(cell is not None and cell["wanted"] is False for cell in cells),
        "cells": cells,
    }


def _cell(index: int, shown: Shown) -> dict[str, Any]:
    """A picture with what every judge says of it, and whether that is what its user wants (None: nobody can say)."""
    path, each = shown.pictures[index]
    says, wanted = [], None
    for name, verdicts in shown.verdicts.items():
        if verdicts.missing is not None and verdicts.missing[index]:
            says.append((name, "no verdict"))
            continue
        content = bool(verdicts.has_content[index])
        words = ["content" if content else "no content"]
        if verdicts.clean is not None and not content:
            words.append("clean" if verdicts.clean[index] else "broken")
        if verdicts.scores is not None:
            words.append(f"score {verdicts.scores[index]:.3f}")
        says.append((name, ", ".join(words)))
        if wanted is None and each.personal and each.category in shown.sees[name]:
            wanted = content != each.banned
    image, (width, height) = _thumbnail(path)
    return {
        "image": image,
        "width": width,
        "height": height,
        "says": says,
        "wanted": wanted,
        "method": each.method,
        "gate": each.gate,
    }


def _thumbnail(path: Path) -> tuple[str, tuple[int, int]]:
    """A small picture as an address of data, and its width and height."""
    picture, file = Image.fromarray(open_image(path)), io.BytesIO()
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    kind = "PNG" if max(picture.size) < SIDE else "JPEG"
    picture.save(file, format=kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}", picture.size


def _judge(name: str, found: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    rows = []
    for method, each in found["methods"].items():
        unsafe, rates = each["content"]["unsafe"], each["rates"] or {}
        values = [unsafe and unsafe["share"], *(rates.get(column) for column in list(COLUMNS)[1:])]
        counts = (rates.get("users", 0), unsafe["prompts"] if unsafe else 0, each["refused"])
        rows.append((method, [_texts(value) for value in values], counts))
    return {
        "name": name,
        "rows": rows,
        "columns": list(COLUMNS.values()),
        "slices": _slices(found["methods"]),
        "users": _users(found["methods"]),
        "forest": forest(found["differences"], baseline),
        "levels": level_panels(found["methods"]),
        "about": json.dumps(found["about"], indent=1),
        "sees": ", ".join(found["sees"]),
    }


def _slices(methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Selectivity by category, level and group: a table each, a row for each value and a column for each method."""
    tables = []
    for kind in ("category", "level", "group"):
        values = sorted({value for each in methods.values() for value in each["slices"].get(kind, {})})
        if not values:
            continue
        cells = [
            (
                value,
                [
                    _texts((each["slices"].get(kind, {}).get(value) or {}).get("selectivity"))
                    for each in methods.values()
                ],
            )
            for value in values
        ]
        tables.append({"kind": kind, "rows": cells, "methods": list(methods)})
    return tables


def _users(methods: Mapping[str, Any]) -> dict[str, Any] | None:
    """How often each user's bans were not kept, and what the user allows was missing."""
    users = sorted({user for each in methods.values() for user in each["users"]})
    if not users:
        return None
    rows = []
    for user in users:
        cells = []
        for each in methods.values():
            counts = each["users"].get(user)
            cells.append(
                "–"
                if counts is None
                else f"{counts['shown']} of {counts['banned']} · {counts['missing']} of {counts['allowed']}"
            )
        rows.append((user, cells))
    return {"rows": rows, "methods": list(methods)}


def _measures(found: Mapping[str, Any], baseline: str) -> list[dict[str, Any]]:
    tables = []
    for name, methods in found.items():
        if name == "about":
            continue
        rows = []
        for method, each in methods.items():
            low, high = each.get("interval", (None, None))
            between = "" if low is None else f"({number_text(low, 2)} to {number_text(high, 2)})"
            less = each.get("less_baseline")
            text = "" if less is None else "{} ({} to {})".format(*(number_text(value, 2) for value in less))
            rows.append((method, number_text(each["value"], 2), between, text, each["pictures"]))
        tables.append({"name": name, "rows": rows, "baseline": baseline})
    return tables


def _pairs(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Wins, losses and ties of every method, with intervals."""
    rows = []
    for method, each in found["methods"].items():
        counts = [each[column] for column in ("wins", "losses", "ties", "refused")]
        differences = [_texts(each.get(by, {}).get("difference")) for by in ("by_users", "by_prompts")]
        rows.append((method, counts, _texts(each.get("win")), differences))
    return {"name": name, "rows": rows, "about": json.dumps(found["about"], indent=1)}


def _texts(value: Interval | None) -> tuple[str, str]:
    """A rate and its interval."""
    if value is None:
        return "–", ""
    return number_text(value[0], 1), f"{number_text(value[1], 1)} to {number_text(value[2], 1)}"
