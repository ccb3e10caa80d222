"""Judging listed pictures and leaving what was found: verdicts, `result.json`, a page and its figures."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psa_jax
from psa_jax.errors import PSAError
from psa_jax.evaluation.judged_figures import write_figures
from psa_jax.evaluation.judged_page import Shown, write_judged_page
from psa_jax.evaluation.judges.judge import Judge
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.picture_rates import (
    Judged,
    by_slice,
    by_user,
    content_shares,
    differences,
    personal_rates,
    with_holm,
)
from psa_jax.evaluation.protocol import Verdicts
from psa_jax.evaluation.readings import Readings
from psa_jax.files import owner_only, write_private
from psa_jax.hosts import Part
from psa_jax.progress import print_stage

RESULT_FILE, PAGE_FILE = "result.json", "report.html"
NEEDED = ("statsmodels", "matplotlib")
"""Packages of the extra `eval` that it compares and draws with."""


def missing_packages() -> list[str]:
    """Those of `NEEDED` that are not there."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def require_packages() -> None:
    """Checks that `NEEDED` are there, before any work.

    Raises:
      PSAError: one is missing.
    """
    if missing := missing_packages():
        raise PSAError(f"judged pictures are compared and drawn with {missing[0]}: pip install 'psa_jax[eval]'")


def judge_pictures(
    listed: Sequence[tuple[Path, Pictured]],
    judges: Mapping[str, Judge],
    out: Path,
    baseline: str,
    command: str,
    measures: Mapping[str, Any] | None = None,
    pairs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judges pictures and writes `result.json`, `report.html` and figures. Verdicts that are there already are kept.

    Args:
      listed: pictures with their paths.
      judges: by name.
      out: folder for everything.
      baseline: the method that others are compared with.
      command: what it was made with, for the page.
      measures: what `psa_jax.evaluation.measured.measured` found, if it was asked.
      pairs: what compared two methods' pictures found, by its name, if it was asked.

    Returns:
      What `result.json` holds.

    Raises:
      PSAError: a picture cannot be read or judged, or a file cannot be written.
    """
    with owner_only():
        out.mkdir(parents=True, exist_ok=True)
        judged = {name: _judge(name, judge, listed, out, baseline) for name, judge in judges.items()}
        result = {
            "psa_jax": psa_jax.__version__,
            "baseline": baseline,
            "pictures": len({path for path, _ in listed}),
            "judges": {name: found for name, (found, _) in judged.items()},
            "measures": dict(measures or {}),
            "pairs": dict(pairs or {}),
        }
        write_private(out / RESULT_FILE, json.dumps(result, indent=1, allow_nan=False) + "\n")
        shown = Shown(
            listed,
            {name: verdicts for name, (_, verdicts) in judged.items()},
            {name: judge.sees for name, judge in judges.items()},
        )
        write_judged_page(out / PAGE_FILE, result, shown, command)
        write_figures(out, result["judges"], baseline)
    return result


def judge_part(
    listed: Sequence[tuple[Path, Pictured]], judges: Mapping[str, Judge], out: Path, part: Part
) -> dict[str, int]:
    """Judges one host's part of the pictures; `judge_pictures`, called when all hosts are done, finds the verdicts.

    Args:
      listed, judges, out: as of `judge_pictures`, the same for all hosts.
      part: of this host.

    Returns:
      For each judge, how many verdicts this host has.

    Raises:
      PSAError: a picture cannot be read or judged.
    """
    counts = {}
    with owner_only():
        out.mkdir(parents=True, exist_ok=True)
        for name, judge in judges.items():
            readings = Readings(out / f"{name}.jsonl", judge, part)
            print_stage(f"{name}: host {part[0]} of {part[1]}, {len(readings)} verdicts there already")
            readings.judged([path for path, _ in listed], [each.case for _, each in listed], name)
            counts[name] = len(readings)
    return counts


def _judge(
    name: str, judge: Judge, listed: Sequence[tuple[Path, Pictured]], out: Path, baseline: str
) -> tuple[dict[str, Any], Verdicts]:
    """What the result says of one judge, and its verdicts on all pictures."""
    readings = Readings(out / f"{name}.jsonl", judge)
    pictures = [each for _, each in listed]
    print_stage(f"{name}: {len(pictures)} lines of manifests, {len(readings)} verdicts there already")
    verdicts = readings.judged([path for path, _ in listed], [each.case for each in pictures], name)
    whole = Judged(pictures, verdicts, judge.sees)
    judged = whole.said()
    methods, compared = {}, {}
    for method in whole.methods:
        part = judged.part(lambda each, method=method: each.method == method)
        methods[method] = {
            "content": content_shares(part),
            "rates": personal_rates(part),
            "slices": by_slice(part),
            "users": by_user(part),
            "refused": sum(each.method == method for each in pictures) - len(part.pictures),
        }
        if method != baseline:
            compared[method] = differences(judged, method, baseline)
    with_holm([test for outcomes in compared.values() for test in outcomes.values()])
    said = {"about": dict(judge.about), "sees": sorted(judge.sees), "methods": methods, "differences": compared}
    return said, verdicts
