"""A record of a comparison: all runs in one file, to make the table again or to go on elsewhere.

JSON lines: the first has the format and, for each group, what rates need of its cases; each further one is a run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import Case
from psa_jax.files import read_bytes, write
from psa_jax.json_input import parse_json, read_json
from psa_jax.mini.comparison import ADAPTERS, OBJECTIVES, RESULT_FILE, Method, Result, result_of
from psa_jax.mini.protocol import MiniCase, cases_hash

FORMAT = "psa_jax.comparison/1"
METHODS = frozenset(f"{adapter}-{objective}" for adapter in ADAPTERS for objective in OBJECTIVES)
"""Names of methods, without their steps."""


def write_record(path: Path, folders: Iterable[Path], cases: Mapping[str, Sequence[MiniCase]]) -> None:
    """Writes the record of runs that have ended.

    Users are numbers here: which cases are of one user is all that intervals need.

    Args:
      path: the file.
      folders: of the runs.
      cases: of each group, on which all of them were judged.
    """
    groups = {}
    for name, group in cases.items():
        users = np.unique([case.user_id for case in group], return_inverse=True)[1].tolist()
        bits = {field: _packed("".join("01"[getattr(case, field)] for case in group)) for field in ("unsafe", "banned")}
        groups[name] = {"hash": cases_hash(group), "users": users, **bits}
    lines: list[dict[str, Any]] = [{"format": FORMAT, "cases": groups}]
    for folder in folders:
        run = read_json(folder / RESULT_FILE)
        packed = {name: {f: _packed(bits) for f, bits in each.items()} for name, each in run["verdicts"].items()}
        lines.append(run | {"verdicts": packed})
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_record(path: Path) -> tuple[dict[str, list[Case]], list[dict[str, Any]]]:
    """Reads a record.

    Returns:
      For each group its cases, without their prompts; and the runs, each as its folder has it.

    Raises:
      PSAError: the file is missing, or is no record.
    """
    first, *runs = [parse_json(line, f"{path}, line {number}") for number, line in enumerate(_lines(path), start=1)]
    if first.get("format") != FORMAT or not isinstance(first.get("cases"), dict):
        raise PSAError(f"{path}: no record of a comparison ({FORMAT}); give one that psa-jax compare wrote")
    for run in runs:
        _check_method(path, run)
    cases = {}
    for name, group in first["cases"].items():
        unsafe, banned = (_unpacked(group[field]) for field in ("unsafe", "banned"))
        cases[name] = [
            Case(f"{user:07d}", "", "", asks == "1", bans == "1")
            for user, asks, bans in zip(group["users"], unsafe, banned, strict=True)
        ]
    for run in runs:
        run["verdicts"] = {
            name: {f: _unpacked(bits) for f, bits in each.items()} for name, each in run["verdicts"].items()
        }
    return cases, runs


def recorded_results(runs: Sequence[Mapping[str, Any]]) -> list[Result]:
    """The results of the runs of a record."""
    return [result_of(run) for run in runs]


def unpack_record(path: Path, workdir: Path) -> int:
    """Gives each run of a record its folder, where there is none; the number of those that were given one.

    Raises:
      PSAError: the file is missing, or is no record.
    """
    given = 0
    for run in read_record(path)[1]:
        folder = run_folder(workdir, Method(**run["method"]), run["seed"])
        if not folder.exists():
            folder.mkdir(parents=True)
            write(folder / RESULT_FILE, json.dumps(run, indent=1) + "\n")
            given += 1
    return given


def run_folder(workdir: Path, method: Method, seed: int) -> Path:
    """The folder of a run."""
    return workdir / f"{method.name}-seed{seed}"


def _check_method(path: Path, run: Mapping[str, Any]) -> None:
    """Refuses a run whose method is none of this version: it becomes the name of a folder."""
    method, seed = run.get("method"), run.get("seed")
    known = isinstance(method, dict) and method.keys() == set(Method._fields) and type(seed) is int and seed >= 0
    if not known or type(method["steps"]) is not int or f"{method['adapter']}-{method['objective']}" not in METHODS:
        raise PSAError(f"{path}: a run of no method that psa-jax compare has; give a record that it wrote")


def _lines(path: Path) -> list[str]:
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise PSAError(f"{path}: not UTF-8 text; give a record that psa-jax compare wrote") from error
    if not lines:
        raise PSAError(f"{path}: empty; give a record that psa-jax compare wrote")
    return lines


def _packed(bits: str) -> str:
    """Text of 0 and 1 as its length and a hexadecimal number."""
    return f"{len(bits)}:{int(bits or '0', 2):x}"


def _unpacked(text: str) -> str:
    length, _, number = text.partition(":")
    return f"{int(number, 16):0{int(length)}b}" if int(length) else ""
