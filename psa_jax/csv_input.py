"""CSV files from outside, read strictly. No error repeats a cell: it may be about a person."""

import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.files import read_bytes

Reader = Callable[[str], Any]
"""Makes the value of a cell, or raises ValueError with what it has to be."""

BITS = MappingProxyType({"1": True, "0": False})

Line = tuple[int, list[str]]
"""The number of a line in its file, from 1, and its cells."""


def read_csv(path: str | Path) -> list[Line]:
    """Reads all lines, the header with them, without empty ones at the end.

    Raises:
      PSAError: the file is missing, or is no CSV file in UTF-8.
    """
    try:
        # utf-8-sig: spreadsheets put a byte-order mark in front
        text = read_bytes(path).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        lines = [(reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PSAError(f"{path}: not a UTF-8 CSV file ({error})") from error
    while lines and not any(cell.strip() for cell in lines[-1][1]):
        lines.pop()  # editors and spreadsheets leave them
    return lines


def read_records(
    path: str | Path, columns: tuple[str, ...], optional: tuple[str, ...] = ()
) -> list[tuple[int, dict[str, str]]]:
    """Reads the lines below the header by the names of their columns. Other columns are left out.

    Args:
      path: the file.
      columns: that are needed.
      optional: that may be missing; their cells are empty then.

    Returns:
      For each line its number and its cells by column, at least one line.

    Raises:
      PSAError: no such file, a column that is missing or there twice, a line of another length, or no lines.
    """
    lines = read_csv(path)
    header = lines[0][1] if lines else []
    for column in (*columns, *optional):
        if header.count(column) != 1 and (column in columns or column in header):
            raise PSAError(
                f'{path}: column "{column}" is {"there twice" if column in header else "missing"}; the first line has '
                f"to name {', '.join(columns)}, each once"
            )
    if len(lines) < 2:
        raise PSAError(f"{path}: only a header; give a file with lines below it")
    place = {column: header.index(column) for column in (*columns, *optional) if column in header}
    absent = {column: "" for column in optional if column not in header}
    records = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise PSAError(f"{path}, line {number}: {len(cells)} cells; the header has {len(header)}")
        records.append((number, {column: cells[index] for column, index in place.items()} | absent))
    return records


def read_cells(cells: Mapping[str, str], readers: Mapping[str, Reader], where: str) -> dict[str, Any]:
    """Makes the values of a line.

    Args:
      cells: by column.
      readers: of the columns that are wanted.
      where: file and line, for messages.

    Raises:
      PSAError: a cell cannot be read; the message names its column, not its value.
    """
    values = {}
    for column, read in readers.items():
        try:
            values[column] = read(cells[column])
        except ValueError as error:
            raise PSAError(f"{where}: {column} has to be {error}") from None
    return values


def name_of(text: str) -> str:
    """A text that is not empty."""
    if not text.strip():
        raise ValueError("a name")
    return text


def whole_number(text: str) -> int:
    """A whole number from 0 to 2⁶⁴ − 1."""
    if not re.fullmatch("[0-9]{1,20}", text) or int(text) >= 1 << 64:
        raise ValueError("a whole number from 0 to 2^64 - 1")
    return int(text)


def choice_of(values: Mapping[str, Any]) -> Reader:
    """A reader of one of some texts, which gives the value of it."""

    def read(text: str) -> Any:
        if text not in values:
            raise ValueError(f"one of {', '.join(name or 'nothing' for name in values)}")
        return values[text]

    return read
