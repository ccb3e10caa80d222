"""Checks a SAGE folder: every row, every picture, and rows against each other. The report names all bad rows.

A report names files, lines, ids and fields, never a value of a profile.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from psa_jax.data.images import Surveyed, survey
from psa_jax.data.rows import PROMPT_KINDS, SPLITS
from psa_jax.data.sage import METADATA, RowError, SageRecord, ScannedRow, scan_lines, split_lines
from psa_jax.errors import PSAError
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import COLUMNS, UserProfile
from psa_jax.progress import print_stage, track

FORMAT = "psa_jax.check/1"
CHECKS = ("json", "schema", "values", "names", "label", "pictures", "duplicates", "population", "users", "prompts")
"""The checks of a row: the first seven are those of `scan_lines` (pictures are also decoded), the others are here."""
RELEASED_USERS = 1000
"""Size of the population that SAGE's users come from."""

Rows = Mapping[str, Sequence[ScannedRow]]
"""Split → its rows."""


class Finding(NamedTuple):
    """A problem of a row that only its pictures or other rows show.

    Args:
      split: the split of the row.
      row: the row.
      problem: the problem.
    """

    split: str
    row: ScannedRow
    problem: RowError


@dataclass(frozen=True)
class BadRow:
    """A row for the quarantine.

    Args:
      split: its split.
      line: its number in the split's metadata.jsonl, from 1.
      record: the content of the row; None if it cannot be read.
      problems: all its problems.
    """

    split: str
    line: int
    record: SageRecord | None
    problems: tuple[RowError, ...]

    @property
    def file(self) -> str:
        """The file with the row, relative to the checked folder."""
        return f"{self.split}/{METADATA}"

    @property
    def reason(self) -> str:
        """All problems in one line."""
        return " | ".join(map(str, self.problems))

    def to_mapping(self) -> dict[str, Any]:
        """The row's line in quarantine.jsonl, as JSON values."""
        return {
            "file": self.file,
            "line": self.line,
            "file_name": self.record and self.record.file_name,
            "checks": list(dict.fromkeys(problem.check for problem in self.problems)),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Report:
    """The result of `check_sage`.

    Args:
      rows: rows by (split, category, kind of prompt); category and kind are "unreadable" where a row cannot be read.
      bad: the bad rows, by split and line.
      pictures: number of distinct pictures that the rows name and that exist.
      decoded: number of pictures that were decoded; 0 if they were not to be.
      shared_prompts: number of val rows whose prompt is in train, too. The released SAGE is like that: val has new
        users, not new prompts.
      absent: splits that the folder does not have.
      seconds: run time.
    """

    rows: Mapping[tuple[str, str, str], int]
    bad: tuple[BadRow, ...]
    pictures: int
    decoded: int
    shared_prompts: int
    absent: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no row is bad."""
        return not self.bad

    @property
    def bad_rows(self) -> Counter[tuple[str, str, str]]:
        """Number of bad rows by (split, category, kind of prompt), as in `rows`."""
        return Counter(_cell(row.split, row.record) for row in self.bad)

    @property
    def by_check(self) -> dict[str, int]:
        """Check → number of rows that fail it; a row may fail several."""
        failed = Counter(check for row in self.bad for check in {problem.check for problem in row.problems})
        return {check: failed[check] for check in CHECKS}

    def to_mapping(self) -> dict[str, Any]:
        """The report as JSON values; the bad rows themselves are in the quarantine."""
        bad = self.bad_rows
        splits: dict[str, Any] = {}
        for (split, category, kind), count in self.rows.items():
            entry = splits.setdefault(split, {"rows": 0, "bad": 0, "categories": {}})
            entry["rows"] += count
            entry["bad"] += bad[split, category, kind]
            entry["categories"].setdefault(category, {})[kind] = {"rows": count, "bad": bad[split, category, kind]}
        return {
            "format": FORMAT,
            "ok": self.ok,
            "rows": sum(self.rows.values()),
            "bad": len(self.bad),
            "splits": splits,
            "checks": self.by_check,
            "pictures": self.pictures,
            "decoded": self.decoded,
            "val_prompts_in_train": self.shared_prompts,
            "absent": list(self.absent),
            "seconds": round(self.seconds, 2),
        }


def check_sage(
    root: Path,
    *,
    users: Sequence[UserProfile] | None = None,
    images: bool = True,
    processes: int | None = None,
) -> Report:
    """Checks every row of every split in the folder, and every picture that a row names.

    A row is bad if
      - it breaks the rules of `parse_row` or repeats a name;
      - a picture is missing, refused by `open_image`, or of another size than its counterpart;
      - its user's attributes differ from the population or from the user's other rows;
      - it leaks: users of val and test_unseen must be new, those of test_seen must be in train, and no prompt of a test
        split may be in train or val.

    Args:
      root: folder in SAGE's layout.
      users: the population; None means the 1,000 users released with SAGE. Other ids are not compared with it.
      images: decode the pictures; otherwise they only have to exist.
      processes: for decoding; None takes one a core.

    Raises:
      PSAError: the folder has no split, or the metadata of one cannot be read at all.
    """
    start = time.perf_counter()
    root = Path(root)
    # A dangling link is a broken split, not an absent one.
    present = [split for split in SPLITS if (root / split).is_symlink() or (root / split).exists()]
    if not present:
        raise PSAError(f"{root}: none of the folders {', '.join(SPLITS)} is there; give a folder in SAGE's layout")
    lines = {split: split_lines(root, split) for split in present}
    print_stage(f"reading {sum(map(len, lines.values()))} rows")
    rows = {split: tuple(scan_lines(root, split, lines[split])) for split in present}
    population = sample_population(RELEASED_USERS) if users is None else users
    findings = [
        *population_findings(rows, {user.user_id: user for user in population}),
        *user_findings(rows),
        *prompt_findings(rows),
    ]
    names = list(dict.fromkeys((split, name) for split in present for row in rows[split] for name in row.pictures))
    if images:
        paths = [root / split / name for split, name in names]
        found = track(survey(paths, processes), len(names), "picture", "decoding")
        decoded = dict(zip(names, found, strict=True))
        findings += picture_findings(rows, decoded)
    return Report(
        rows=Counter(_cell(split, row.record) for split in present for row in rows[split]),
        bad=tuple(_bad_rows(rows, findings)),
        pictures=len(names),
        decoded=len(names) if images else 0,
        shared_prompts=_shared_prompts(rows),
        absent=tuple(split for split in SPLITS if split not in present),
        seconds=time.perf_counter() - start,
    )


def quarantine(report: Report) -> bytes:
    """Content of quarantine.jsonl: one line for each bad row, with file, line number and reason."""
    return b"".join(json.dumps(row.to_mapping()).encode() + b"\n" for row in report.bad)


# --- rows against each other


def population_findings(rows: Rows, population: Mapping[str, UserProfile]) -> Iterator[Finding]:
    """Finds rows whose user differs from the population, or from the majority of the user's rows.

    Args:
      rows: of all splits.
      population: user id → profile.
    """
    said = defaultdict(Counter)
    for _, row in _readable(rows):
        said[row.record.user_id][row.record.profile, row.record.cluster_id] += 1
    usual = {user_id: counts.most_common(1)[0][0] for user_id, counts in said.items()}
    for split, row in _readable(rows):
        user_id, profile = row.record.user_id, row.record.profile
        usual_profile, cluster_id = usual[user_id]
        expected = population.get(user_id, usual_profile)
        if profile != expected:
            source = "the population" if user_id in population else "the user's other rows"
            fields = [COLUMNS[field] for field in COLUMNS if getattr(profile, field) != getattr(expected, field)]
            yield _finding(split, row, "population", f"user {user_id}: {', '.join(fields)} not as in {source}")
        elif row.record.cluster_id != cluster_id:
            yield _finding(split, row, "population", f"user {user_id}: Cluster_ID not as in the user's other rows")


def user_findings(rows: Rows) -> Iterator[Finding]:
    """Finds rows whose user must not be in their split."""
    users = {split: {row.record.user_id for row in rows[split] if row.record} for split in rows}
    for split, row in _readable(rows):
        user_id = row.record.user_id
        if split == "test_seen" and "train" in rows and user_id not in users["train"]:
            yield _finding(split, row, "users", f"user {user_id} is not in train, as those of test_seen must be")
        for earlier in {"val": ("train",), "test_unseen": ("train", "val")}.get(split, ()):
            if user_id in users.get(earlier, ()):
                yield _finding(split, row, "users", f"user {user_id} is in {earlier} too: {split} must have new users")


def prompt_findings(rows: Rows) -> Iterator[Finding]:
    """Finds rows of test splits whose prompt, up to spaces and case, is in train or val."""
    first: dict[str, str] = {}
    for split, row in _readable(rows):
        if split in ("train", "val"):
            first.setdefault(_prompt(row.record), f"{split}/{METADATA}, line {row.line}")
        elif where := first.get(_prompt(row.record)):
            yield _finding(split, row, "prompts", f"the caption is in {where} too: tests must have new prompts")


def picture_findings(rows: Rows, decoded: Mapping[tuple[str, str], Surveyed]) -> Iterator[Finding]:
    """Finds rows with a picture that cannot be decoded, or whose pictures differ in size and so in their crop.

    Args:
      rows: of all splits.
      decoded: (split, name of the picture) → the result of decoding it.
    """
    for split, row in _readable(rows):
        sizes = set()
        for name in row.pictures:
            size, problem = decoded[split, name]
            if problem is not None:
                yield _finding(split, row, "pictures", f"picture {name}: {problem}")
            else:
                sizes.add(size)
        if len(sizes) > 1:
            yield _finding(split, row, "pictures", "the pictures differ in size; give both one size")


def _shared_prompts(rows: Rows) -> int:
    train = {_prompt(row.record) for row in rows.get("train", ()) if row.record}
    return sum(_prompt(row.record) in train for row in rows.get("val", ()) if row.record)


def _readable(rows: Rows) -> Iterator[tuple[str, ScannedRow]]:
    """(split, row) of all readable rows, in the order of SPLITS."""
    return ((split, row) for split in SPLITS for row in rows.get(split, ()) if row.record is not None)


def _prompt(record: SageRecord) -> str:
    return " ".join(record.caption.casefold().split())


def _finding(split: str, row: ScannedRow, check: str, text: str) -> Finding:
    return Finding(split, row, RowError(check, text))


def _bad_rows(rows: Rows, findings: Iterable[Finding]) -> Iterator[BadRow]:
    found = defaultdict(list)
    for split, row, problem in findings:
        found[split, row.line].append(problem)
    for split in rows:
        for row in rows[split]:
            problems = (*row.problems, *found[split, row.line])
            if problems:
                yield BadRow(split, row.line, row.record, problems)


def _cell(split: str, record: SageRecord | None) -> tuple[str, str, str]:
    return (split, record.category, PROMPT_KINDS[record.unsafe]) if record else (split, "unreadable", "unreadable")
