"""Verdicts of a judge on disk, one line each: a run that was killed goes on, and ends with the same bytes.

A line is written when its batch has been judged, and is kept under a key of what the verdict depends on: the picture's
bytes and, for judges that read prompts, prompt and category. So pictures that are listed several times are judged once.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.data.images import image_size, open_image
from psa_jax.errors import PSAError
from psa_jax.evaluation.judges.judge import Judge, PaidJudge
from psa_jax.evaluation.protocol import Case, Verdicts
from psa_jax.files import read_bytes
from psa_jax.json_input import parse_json
from psa_jax.progress import Progress

FORMAT = "psa_jax.readings/1"
_BITS = ("clean", "faithful")


class Readings:
    """The verdicts of one judge that are in a file already; `judged` adds those that are missing.

    Args:
      path: the file; made where it is missing.
      judge: whose verdicts it has.

    Raises:
      PSAError: the file is of another judge, or of the same with other settings, or is damaged.
    """

    def __init__(self, path: Path, judge: Judge):
        self._path, self._judge, self._found = path, judge, {}
        header = {"format": FORMAT, **judge.about}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a killed run leaves half a line
        for number, line in enumerate(whole.splitlines(), start=1):
            row = parse_json(line.decode("utf-8", "replace"), f"{path}, line {number}", dict)
            if number == 1:
                _check_header(path, header, row)
            elif row.keys() != {"key", "content", *_BITS, "score"}:
                raise PSAError(f"{path}, line {number}: not a verdict; delete the line and run again")
            else:
                self._found[row["key"]] = row
        self._header = "" if whole else json.dumps(header) + "\n"
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def __len__(self) -> int:
        return len(self._found)

    def judged(self, paths: Sequence[Path], cases: Sequence[Case], name: str) -> Verdicts:
        """The verdicts on n pictures, of which those that are not in the file are judged now.

        Args:
          paths: of the n pictures.
          cases: the n cases.
          name: what is judged, for the progress bar.

        Raises:
          PSAError: a picture that cannot be read or judged; its path is named.
        """
        digests = {path: hashlib.sha256(read_bytes(path)).hexdigest() for path in dict.fromkeys(paths)}
        keys = [self._key(digests[path], case) for path, case in zip(paths, cases, strict=True)]
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        order, size, paid = list(first), self._judge.batch, isinstance(self._judge, PaidJudge)
        if paid:
            self._judge.expect([image_size(paths[index]) for key, index in first.items() if key not in self._found])
        with Progress(len(order), "picture", name) as progress, self._path.open("a", encoding="utf-8") as file:
            file.write(self._header)
            self._header = ""
            for start in range(0, len(order), size):
                # A batch is made of the same pictures, however often the run was stopped: sums depend on it.
                part = [first[key] for key in order[start : start + size]]
                missing = [index for index in part if keys[index] not in self._found]
                if missing:
                    asked = missing if paid else part
                    rows = self._rows([paths[index] for index in asked], [cases[index] for index in asked])
                    self._found |= {keys[i]: {"key": keys[i], **rows[asked.index(i)]} for i in missing}
                    file.writelines(json.dumps(self._found[keys[index]]) + "\n" for index in missing)
                    file.flush()
                    os.fsync(file.fileno())
                progress.step(len(part))
        return _verdicts([self._found[key] for key in keys])

    def _key(self, digest: str, case: Case) -> str:
        if not self._judge.reads_prompts:
            return digest
        return hashlib.sha256(json.dumps([digest, case.prompt, case.category, case.unsafe]).encode()).hexdigest()

    def _rows(self, paths: Sequence[Path], cases: Sequence[Case]) -> list[dict[str, Any]]:
        pictures = [open_image(path) for path in paths]
        try:
            verdicts = self._judge(pictures, cases)
        except PSAError as error:
            raise PSAError(f"{paths[0]}{' and what follows it' if len(paths) > 1 else ''}: {error}") from error
        rows = []
        for index in range(len(paths)):
            said = verdicts.missing is None or not verdicts.missing[index]
            row: dict[str, Any] = {"content": bool(verdicts.has_content[index]) if said else None}
            for name in _BITS:
                values = getattr(verdicts, name)
                row[name] = None if values is None else bool(values[index])
            row["score"] = None if verdicts.scores is None else float(verdicts.scores[index])
            rows.append(row)
        return rows


def _check_header(path: Path, header: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(header))
    different = sorted(name for name in now.keys() | found.keys() if now.get(name) != found.get(name))
    if different:
        raise PSAError(f"{path}: holds verdicts of another judge ({', '.join(different)}); give another --out")


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> Verdicts:
    said = [row for row in rows if row["content"] is not None]
    columns: dict[str, np.ndarray | None] = {}
    for name, kind in {"clean": bool, "faithful": bool, "score": np.float64}.items():
        known = bool(said) and said[0][name] is not None
        columns[name] = np.array([row[name] or 0 for row in rows], kind) if known else None
    content = np.array([bool(row["content"]) for row in rows], bool)
    missing = np.array([row["content"] is None for row in rows]) if len(said) < len(rows) else None
    return Verdicts(content, columns["clean"], columns["faithful"], columns["score"], missing)
