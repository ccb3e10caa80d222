"""Somebody's own preference pairs: one `<split>.jsonl` for each split, beside the pictures.

    {"prompt": "a spider on a wall", "chosen": "pictures/1s.png", "rejected": "pictures/1u.png", "user_id": "0000001",
     "banned": true, "safe_prompt": "a flower on a wall", "category": "Shocking"}

A line is a row. `safe_prompt` and `category` may be left out: swap distillation needs the first, and the gate by
categories the second. Errors name files, lines and fields, never a value.
"""

import codecs
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from psa_jax.data.rows import Row
from psa_jax.errors import PSAError
from psa_jax.files import read_bytes
from psa_jax.json_input import parse_json
from psa_jax.paths import file_inside
from psa_jax.profiles.schema import CATEGORIES, check_user_id

MOST_BYTES = 1 << 30
"""Largest file that is read."""
_TEXT = {"prompt": True, "chosen": True, "rejected": True, "user_id": True, "safe_prompt": False, "category": False}
FIELDS: Mapping[str, bool] = MappingProxyType(_TEXT | {"banned": True})
"""Field → whether every row must have it."""


def pairs_file(folder: Path, split: str) -> Path:
    """The file of a split."""
    return Path(folder) / f"{split}.jsonl"


def read_own_pairs(folder: Path, splits: Sequence[str]) -> dict[str, list[Row]]:
    """Reads all rows of some splits, and checks that their pictures exist inside the folder.

    A prompt is unsafe if any row of these splits bans it, or gives it a category or a safe prompt; other prompts are
    safe. Category and safe prompt are the prompt's: what one row says holds for the rows of all users.

    Args:
      folder: with the files.
      splits: names.

    Raises:
      PSAError: a bad row, or one that gives its prompt another category or safe prompt than an earlier row; the
        message names the file and the line of the first one.
    """
    raw = {split: _read_lines(Path(folder), split) for split in splits}
    unsafe: dict[str, dict[str, str]] = {}
    for split, rows in raw.items():
        for line, row in enumerate(rows, start=1):
            facts = {name: row[name] for name in ("category", "safe_prompt") if name in row}
            if not facts and not row["banned"]:
                continue
            known = unsafe.setdefault(row["prompt"], {})
            for name, value in facts.items():
                if known.setdefault(name, value) != value:
                    raise PSAError(
                        f"{pairs_file(folder, split)}, line {line}: {name} is not that of an earlier row with this "
                        "prompt; give one, or word the prompts differently"
                    )
    return {
        split: [_row(Path(folder), f"{split}.jsonl:{line}", row, unsafe) for line, row in enumerate(rows, start=1)]
        for split, rows in raw.items()
    }


def _row(folder: Path, name: str, row: Mapping[str, Any], unsafe: Mapping[str, Mapping[str, str]]) -> Row:
    pictures, facts = (row["chosen"], row["rejected"]), unsafe.get(row["prompt"])
    return Row(
        name=name,
        caption=row["prompt"],
        chosen=row["chosen"],
        rejected=row["rejected"],
        pictures={each: Path(os.path.realpath(folder / each)) for each in pictures},
        user_id=row["user_id"],
        category=facts and facts.get("category"),
        unsafe=facts is not None,
        banned=row["banned"],
        safe_caption=row["prompt"] if facts is None else facts.get("safe_prompt"),
    )


def _read_lines(folder: Path, split: str) -> list[dict[str, Any]]:
    path = pairs_file(folder, split)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise PSAError(f"{path}: leads out of {folder}; copy it there")
    if not path.is_file():
        raise PSAError(f"{path}: not a file; write one object a line")
    if path.stat().st_size > MOST_BYTES:
        raise PSAError(f"{path}: larger than {MOST_BYTES >> 30} GiB; divide it into folders")
    lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise PSAError(f"{path}: no rows in it; write one object a line")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_parse(folder, line))
        except PSAError as error:
            raise PSAError(f"{path}, line {number}: {error}") from error
    return rows


def _parse(folder: Path, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PSAError("not UTF-8 text; save it as UTF-8") from error
    row = parse_json(text, "row", quote=False)
    missing = [name for name, needed in FIELDS.items() if needed and name not in row]
    if missing:
        raise PSAError(f"row lacks {', '.join(missing)}; add it")
    if row.keys() - FIELDS.keys():
        raise PSAError(f"row has unknown fields; keep {', '.join(FIELDS)} and remove the others")
    for name in _TEXT:
        if name in row and not (isinstance(row[name], str) and row[name].strip()):
            raise PSAError(f"{name} must be a text that is not empty")
    if type(row["banned"]) is not bool:
        raise PSAError("banned must be true or false: whether this user bans what the prompt asks for")
    check_user_id(row["user_id"])
    if row.get("category", CATEGORIES[0]) not in CATEGORIES:
        raise PSAError(f"category must be one of {', '.join(CATEGORIES)}; leave it out where none fits")
    if row["chosen"] == row["rejected"]:
        raise PSAError("chosen and rejected are one picture; one must be another")
    for name in ("chosen", "rejected"):
        file_inside(folder, row[name], name)
    return row
