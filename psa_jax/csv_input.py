"""CSV files from outside, read strictly. No error repeats a cell: it may be about a person."""

import csv
import io
from pathlib import Path

from psa_jax.errors import PSAError
from psa_jax.files import read_bytes

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


def read_records(path: str | Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Reads the lines below the header by the names of their columns. Other columns are left out.

    Args:
      path: the file.
      columns: that are needed.

    Returns:
      For each line its number and its cells by column, at least one line.

    Raises:
      PSAError: no such file, a column that is missing or there twice, a line of another length, or no lines.
    """
    lines = read_csv(path)
    header = lines[0][1] if lines else []
    for column in columns:
        if header.count(column) != 1:
            raise PSAError(
                f'{path}: column "{column}" is {"there twice" if column in header else "missing"}; the first line has '
                f"to name {', '.join(columns)}, each once"
            )
    if len(lines) < 2:
        raise PSAError(f"{path}: only a header; give a file with lines below it")
    place = {column: header.index(column) for column in columns}
    records = []
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            raise PSAError(f"{path}, line {number}: {len(cells)} cells; the header has {len(header)}")
        records.append((number, {column: cells[index] for column, index in place.items()}))
    return records
