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
from psa_jax.hosts import Part
from psa_jax.json_input import parse_json
from psa_jax.progress import Progress

FORMAT = "psa_jax.readings/1"
_BITS = ("clean", "faithful")


class Readings:
    """The verdicts of one judge that are in a file already; `judged` adds those that are missing.

    Args:
      path: the file; made where it is missing.
      judge: whose verdicts it has.
      part: of this host, where several share the work: its verdicts get a file of their own, which a reading without
        a part reads, too.

    Raises:
      PSAError: the file is of another judge, or of the same with other settings, or is damaged.
    """

    def __init__(self, path: Path, judge: Judge, part: Part | None = None):
        self._path = path if part is None else path.with_name(f"{path.stem}.{part[0]}-of-{part[1]}.jsonl")
        self._judge, self._part, self._found = judge, part, {}
        if part is None:
            for other in sorted(path.parent.glob(f"{path.stem}.*-of-*.jsonl")):
                self._read(other)
        whole, content = self._read(self._path)
        self._header = "" if whole else json.dumps({"format": FORMAT, **judge.about}) + "\n"
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))

    def _read(self, path: Path) -> tuple[bytes, bytes]:
        """Takes over the verdicts of a file; returns its whole lines, and its contents."""
        header = {"format": FORMAT, **self._judge.about}
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
        return whole, content

    def __len__(self) -> int:
        return len(self._found)

    def judged(self, paths: Sequence[Path], cases: Sequence[Case], name: str) -> Verdicts | None:
        """The verdicts on n pictures, of which those that are not in the file are judged now.

        Args:
          paths: of the n pictures.
          cases: the n cases.
          name: what is judged, for the progress bar.

        Returns:
          The verdicts; None of a part, which judges every N-th batch and leaves the whole to a reading without a part.

        Raises:
          PSAError: a picture that cannot be read or judged; its path is named.
        """
        digests = {path: hashlib.sha256(read_bytes(path)).hexdigest() for path in dict.fromkeys(paths)}
        keys = [self._key(digests[path], case) for path, case in zip(paths, cases, strict=True)]
        first: dict[str, int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        order, size, paid = list(first), self._judge.batch, isinstance(self._judge, PaidJudge)
        # A batch is made of the same pictures, however often the run was stopped: sums depend on it.
        batches = [[first[key] for key in order[start : start + size]] for start in range(0, len(order), size)]
        if self._part is not None:
            batches = batches[self._part[0] :: self._part[1]]
        mine = [index for batch in batches for index in batch]
        if paid:
            self._judge.expect([image_size(paths[index]) for index in mine if keys[index] not in self._found])
        with Progress(len(mine), "picture", name) as progress, self._path.open("a", encoding="utf-8") as file:
            file.write(self._header)
            self._header = ""
            for part in batches:
                missing = [index for index in part if keys[index] not in self._found]
                if missing:
                    asked = missing if paid else part
                    rows = self._rows([paths[index] for index in asked], [cases[index] for index in asked])
                    self._found |= {keys[i]: {"key": keys[i], **rows[asked.index(i)]} for i in missing}
                    file.writelines(json.dumps(self._found[keys[index]]) + "\n" for index in missing)
                    file.flush()
                    os.fsync(file.fileno())
                progress.step(len(part))
        return None if self._part is not None else _verdicts([self._found[key] for key in keys])

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
