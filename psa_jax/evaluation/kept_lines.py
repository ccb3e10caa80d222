"""Rows in a file of JSON lines, each written when it is known: a run that was killed goes on where it was."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.json_input import parse_json


class KeptLines:
    """Rows by their `key`. The first line of a file says what they depend on.

    Args:
      path: the file; made by the first `add`.
      header: what the rows depend on, JSON values.
      columns: of a row, beside its key.
      others: files with more rows of the same kind, which are only read.

    Attributes:
      rows: key → row.

    Raises:
      PSAError: a file is of something else, or is damaged.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], columns: Sequence[str], others: Iterable[Path] = ()):
        self._path, self._columns, self._wanted = path, {"key", *columns}, json.loads(json.dumps(header))
        self.rows: dict[str, dict[str, Any]] = {}
        for other in others:
            self._read(other)
        whole, content = self._read(path)
        self._header = "" if whole else json.dumps(header) + "\n"
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def _read(self, path: Path) -> tuple[bytes, bytes]:
        """Takes over the rows of a file; returns its whole lines, and its contents."""
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a killed run leaves half a line
        for number, line in enumerate(whole.splitlines(), start=1):
            row = parse_json(line.decode("utf-8", "replace"), f"{path}, line {number}", dict)
            if number == 1:
                self._check_header(path, row)
            elif row.keys() != self._columns:
                raise PSAError(f"{path}, line {number}: not a verdict; delete the line and run again")
            else:
                self.rows[row["key"]] = row
        return whole, content

    def _check_header(self, path: Path, found: Mapping[str, Any]) -> None:
        names = self._wanted.keys() | found.keys()
        different = sorted(name for name in names if self._wanted.get(name) != found.get(name))
        if different:
            raise PSAError(f"{path}: holds verdicts of another judge ({', '.join(different)}); give another --out")

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows to the file, on the disk when this returns; without rows it only makes the file."""
        self.rows |= {row["key"]: row for row in rows}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(self._header)
            self._header = ""
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
