"""Prompts of `psa-jax generate`: from the command line, a text file, or a table in CSV or TSV."""

import csv
import io
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from psa_jax.csv_input import read_cells
from psa_jax.errors import PSAError
from psa_jax.evaluation.manifest import ASKED, FACTS
from psa_jax.interop.diffusers import check_text
from psa_jax.seeds import PICTURE_BITS, check_seed

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# Files whose lines are not prompts.
_NOT_TEXT = (".json", ".jsonl", ".ndjson", ".parquet", ".xls", ".xlsx", ".ods", ".yaml", ".yml", ".html", ".xml")
_COLUMNS = ("prompt", "negative", "seed", ASKED, *FACTS)


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
      text: the prompt.
      negative: its negative prompt; None: that of the command.
      seed: of its first picture; None: that of the command.
      facts: what the file says of it for an evaluation, by columns of `FACTS`; None where it says nothing.
    """

    text: str
    negative: str | None = None
    seed: int | None = None
    facts: Mapping[str, Any] | None = None


def read_prompts(args: Namespace) -> list[Prompt]:
    """Reads the prompts of `--prompt`, in order, then those of `--prompts FILE`.

    Raises:
      PSAError: there is no prompt, text is not UTF-8, the file cannot be read, a prompt is empty, a column is unknown
        or a seed is not valid.
    """
    for text in args.prompt or []:
        check_text(text, "--prompt", "the terminal must send UTF-8; or give --prompts FILE, saved as UTF-8")
    prompts = [Prompt(text) for text in args.prompt or []]
    if args.prompts is not None:
        read = _read(args.prompts)
        if not read:
            raise PSAError(f"{args.prompts}: holds no prompt; write one a line, in .csv and .tsv under the header")
        prompts += read
    if not prompts:
        raise PSAError("no prompts: give --prompt or --prompts FILE")
    return prompts


def _read(path: Path) -> list[Prompt]:
    """Reads a file. Lines end with LF, CR or both; Unicode's other line separators may be part of a prompt."""
    kind = path.suffix.lower()
    if kind in _NOT_TEXT:
        raise PSAError(f"{path}: {kind} is not read; give a text file with a prompt a line, or .csv or .tsv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PSAError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    if "\0" in text:
        raise PSAError(f"{path}: holds zero bytes, as UTF-16 text does; save it as UTF-8")
    if kind not in _SEPARATORS:
        return [Prompt(line.strip()) for line in text.split("\n") if line.strip()]
    reader = csv.DictReader(io.StringIO(text), strict=True, delimiter=_SEPARATORS[kind])
    try:
        columns = reader.fieldnames or []
        if "prompt" not in columns or len(set(columns)) != len(columns) or not set(columns) <= set(_COLUMNS):
            between = "tabs" if kind == ".tsv" else "commas"
            raise PSAError(
                f"{path}: columns {', '.join(columns)}: expected prompt and, if wanted, {', '.join(_COLUMNS[1:])}, "
                f"each once, with {between} between"
            )
        return [_row(row, f"{path}, line {reader.line_num}") for row in reader]
    except csv.Error as error:
        raise PSAError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _row(row: dict[str, str], where: str) -> Prompt:
    if None in row or None in row.values():
        raise PSAError(f"{where}: more or fewer cells than the header has; quote prompts that hold commas")
    if not row["prompt"].strip():
        raise PSAError(f"{where}: empty prompt; remove the line")
    seed = row.get("seed") or None
    if seed is not None:
        if not re.fullmatch("[0-9]{1,20}", seed):  # 2^64 has 20 digits
            raise PSAError(f"{where}: seed {seed[:40]!r}: give a whole number from 0 to {2**PICTURE_BITS - 1}")
        seed = check_seed(int(seed), f"{where}: seed", PICTURE_BITS)
    readers = {ASKED: str.strip, **FACTS}
    facts = read_cells({name: row.get(name, "") for name in readers}, readers, where) if row.keys() & readers else None
    return Prompt(row["prompt"].strip(), row.get("negative") or None, seed, facts)
