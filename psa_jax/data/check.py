"""Is a SAGE folder sound? Every row and every picture, and what rows tell of each other; bad rows are all named.

Nothing in a report is a value of a profile: it names files, lines, ids and fields.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from psa_jax.data.images import Surveyed, survey
from psa_jax.data.sage import METADATA, PROMPT_KINDS, SPLITS, Row, RowError, SageRecord, scan_lines, split_lines
from psa_jax.errors import PSAError
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import COLUMNS, UserProfile
from psa_jax.progress import print_stage, track

FORMAT = "psa_jax.check/1"
CHECKS = ("json", "schema", "values", "names", "label", "pictures", "duplicates", "population", "users", "prompts")
"""What may be wrong with a row: the first seven are of `scan_lines`, pictures are also decoded, the rest is here."""
RELEASED_USERS = 1000
"""Size of the population that SAGE's users come from."""

Rows = Mapping[str, Sequence[Row]]
"""Split -> its rows."""


class Finding(NamedTuple):
    """A problem of one row that shows only beside other rows or its pictures."""

    split: str
    row: Row
    problem: RowError


@dataclass(frozen=True)
class BadRow:
    """A row for the quarantine.

    Args:
      split: its split.
      line: its number in the split's metadata.jsonl, from 1.
      record: what the row says; None if it cannot be read.
      problems: everything that does not hold.
    """

    split: str
    line: int
    record: SageRecord | None
    problems: tuple[RowError, ...]

    @property
    def file(self) -> str:
        """The file that holds it, relative to the folder checked."""
        return f"{self.split}/{METADATA}"

    @property
    def reason(self) -> str:
        """All problems in one line."""
        return " | ".join(map(str, self.problems))

    def to_mapping(self) -> dict[str, Any]:
        """What a line of quarantine.jsonl holds."""
        return {
            "file": self.file,
            "line": self.line,
            "file_name": self.record and self.record.file_name,
            "checks": list(dict.fromkeys(problem.check for problem in self.problems)),
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Report:
    """What `check_sage` found.

    Args:
      rows: rows by (split, category, kind of prompt); category and kind are "unreadable" where a row cannot be read.
      bad: the rows that do not hold, by split and line.
      pictures: distinct pictures that the rows name and that are there.
      decoded: how many of them were decoded; 0 if that was not asked for.
      shared_prompts: val rows whose prompt is in train too. SAGE was released so: val has new users, not new prompts.
      absent: splits that the folder does not have.
      seconds: time that it took.
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
        """Bad rows, counted as `rows` are."""
        return Counter(_cell(row.split, row.record) for row in self.bad)

    @property
    def by_check(self) -> dict[str, int]:
        """Check -> number of rows that fail it; a row may fail several."""
        failed = Counter(check for row in self.bad for check in {problem.check for problem in row.problems})
        return {check: failed[check] for check in CHECKS}

    def to_mapping(self) -> dict[str, Any]:
        """The report for programs; the bad rows themselves are in the quarantine."""
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
    """Checks every row of every split that is there, and every picture that a row names.

    A row is bad if it breaks the rules of `parse_row`, repeats a name, lacks a picture or has one that `open_image`
    refuses or that differs in size from its counterpart, tells of its user something else than the population or the
    user's other rows, or leaks: users of val and test_unseen must be new, those of test_seen must be of train, and no
    prompt of a test split may be in train or val.

    Args:
      root: folder in SAGE's layout.
      users: the population; None means the 1,000 users released with SAGE. Ids outside it are not compared with it.
      images: decode the pictures; without it they must be there, but are not opened.
      processes: how many decode; None takes one a core.

    Raises:
      PSAError: no split is there, or the metadata of one cannot be read at all.
    """
    start = time.perf_counter()
    root = Path(root)
    # lexists: a dangling link is a split that is broken, not one that is absent
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
    """Content of quarantine.jsonl: a line for each bad row, with file, line number and reason."""
    return b"".join(json.dumps(row.to_mapping()).encode() + b"\n" for row in report.bad)


# --- what rows tell of each other


def population_findings(rows: Rows, population: Mapping[str, UserProfile]) -> Iterator[Finding]:
    """Rows whose user is not the one of the population, or differs from what most of the user's rows say."""
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
    """Rows whose user may not be in that split."""
    users = {split: {row.record.user_id for row in rows[split] if row.record} for split in rows}
    for split, row in _readable(rows):
        user_id = row.record.user_id
        if split == "test_seen" and "train" in rows and user_id not in users["train"]:
            yield _finding(split, row, "users", f"user {user_id} is not in train, as those of test_seen must be")
        for earlier in {"val": ("train",), "test_unseen": ("train", "val")}.get(split, ()):
            if user_id in users.get(earlier, ()):
                yield _finding(split, row, "users", f"user {user_id} is in {earlier} too: {split} must have new users")


def prompt_findings(rows: Rows) -> Iterator[Finding]:
    """Rows of the test splits whose prompt, spaces and case aside, is one to train or to choose models with."""
    first: dict[str, str] = {}
    for split, row in _readable(rows):
        if split in ("train", "val"):
            first.setdefault(_prompt(row.record), f"{split}/{METADATA}, line {row.line}")
        elif where := first.get(_prompt(row.record)):
            yield _finding(split, row, "prompts", f"the caption is in {where} too: tests must have new prompts")


def picture_findings(rows: Rows, decoded: Mapping[tuple[str, str], Surveyed]) -> Iterator[Finding]:
    """Rows with a picture that cannot be decoded, or with pictures of two sizes, which cannot get the same crop."""
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


def _readable(rows: Rows) -> Iterator[tuple[str, Row]]:
    """In the order of SPLITS: train, val, then the tests."""
    return ((split, row) for split in SPLITS for row in rows.get(split, ()) if row.record is not None)


def _prompt(record: SageRecord) -> str:
    return " ".join(record.caption.casefold().split())


def _finding(split: str, row: Row, check: str, text: str) -> Finding:
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
