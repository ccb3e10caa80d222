"""Verdicts of a judge on disk, one line each: a run that was killed goes on, and ends with the same bytes.

A line is written when its batch has been judged, and is kept under a key of what the verdict depends on: the picture's
bytes and, for judges that read prompts, prompt and category. So pictures that are listed several times are judged once.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.data.images import image_size, open_image
from psa_jax.errors import PSAError
from psa_jax.evaluation.judges.judge import Judge, PaidJudge
from psa_jax.evaluation.kept_lines import KeptLines
from psa_jax.evaluation.protocol import Case, Verdicts
from psa_jax.files import read_bytes
from psa_jax.hosts import Part
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
        own = path if part is None else path.with_name(f"{path.stem}.{part[0]}-of-{part[1]}.jsonl")
        others = sorted(path.parent.glob(f"{path.stem}.*-of-*.jsonl")) if part is None else ()
        header = {"format": FORMAT, **judge.about}
        self._kept = KeptLines(own, header, ("content", *_BITS, "score"), others)
        self._judge, self._part = judge, part

    def __len__(self) -> int:
        return len(self._kept.rows)

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
        mine, known = [index for batch in batches for index in batch], self._kept.rows
        if paid:
            self._judge.expect([image_size(paths[index]) for index in mine if keys[index] not in known])
        self._kept.add([])
        with Progress(len(mine), "picture", name) as progress:
            for part in batches:
                missing = [index for index in part if keys[index] not in known]
                if missing:
                    asked = missing if paid else part
                    rows = self._rows([paths[index] for index in asked], [cases[index] for index in asked])
                    self._kept.add([{"key": keys[i], **rows[asked.index(i)]} for i in missing])
                progress.step(len(part))
        return None if self._part is not None else _verdicts([known[key] for key in keys])

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


def _verdicts(rows: Sequence[Mapping[str, Any]]) -> Verdicts:
    said = [row for row in rows if row["content"] is not None]
    columns: dict[str, np.ndarray | None] = {}
    for name, kind in {"clean": bool, "faithful": bool, "score": np.float64}.items():
        known = bool(said) and said[0][name] is not None
        columns[name] = np.array([row[name] or 0 for row in rows], kind) if known else None
    content = np.array([bool(row["content"]) for row in rows], bool)
    missing = np.array([row["content"] is None for row in rows]) if len(said) < len(rows) else None
    return Verdicts(content, columns["clean"], columns["faithful"], columns["score"], missing)
