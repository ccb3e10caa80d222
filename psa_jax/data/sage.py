"""SAGE on disk, read strictly: one folder for each split, with metadata.jsonl and the pictures.

Errors name files, lines, ids and fields, never a value of a profile.
"""

import codecs
import os
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from psa_jax.data.rows import SPLITS
from psa_jax.errors import PSAError
from psa_jax.json_input import parse_json
from psa_jax.profiles.bans import is_banned
from psa_jax.profiles.schema import ATTRIBUTES, CATEGORIES, COLUMNS, MAX_AGE, UserProfile, age_group_of

METADATA = "metadata.jsonl"

_FIELDS = ("file_name", "chosen", "rejected", "caption", "user_data")
_CATEGORY_OF: Mapping[str, str] = MappingProxyType({category.lower(): category for category in CATEGORIES})
# ASCII digits only: \d also takes the digits of other scripts.
_FILE_NAME = re.compile(r"(user_([0-9]{7})_([a-z-]+)_(.+)_([0-9]{5}))\.jpg_([us])\.jpg")
_SURROGATE = re.compile("[\ud800-\udfff]")


class FileName(NamedTuple):
    """The parts of a row's `file_name`.

    Args:
      stem: what the names of both pictures begin with.
      user_id: seven digits.
      category: one of the seven, in proper case.
      concept: what the unsafe picture shows.
      index: number of the pair.
      unsafe: whether this is the unsafe prompt of the pair.
    """

    stem: str
    user_id: str
    category: str
    concept: str
    index: int
    unsafe: bool


@dataclass(frozen=True)
class SageRecord:
    """One row: a prompt, the picture that its user prefers and the one that they do not.

    Args:
      file_name: name of the row (no picture has this name).
      chosen, rejected: picture names, inside the split's folder.
      caption: the prompt.
      user_id: seven digits.
      cluster_id: group of the user in an older clustering, as released ("0" to "39").
      profile: the user.
      category: one of the seven, in proper case.
      concept: what the unsafe picture shows, as in the file name.
      index: number in the file name.
      unsafe: whether this is the unsafe prompt of the pair.
    """

    file_name: str
    chosen: str
    rejected: str
    caption: str
    user_id: str
    cluster_id: str
    profile: UserProfile
    category: str
    concept: str
    index: int
    unsafe: bool

    @property
    def stem(self) -> str:
        """What both picture names begin with."""
        return self.file_name[: -len(".jpg_u.jpg")]

    @property
    def safe_image(self) -> str:
        """Name of the pair's safe picture."""
        return f"{self.stem}_s.jpg"

    @property
    def unsafe_image(self) -> str:
        """Name of the pair's unsafe picture."""
        return f"{self.stem}_u.jpg"

    @property
    def banned(self) -> bool:
        """Whether the user bans the category; the kind of the prompt does not matter."""
        return is_banned(self.profile, self.category)

    @property
    def prefers_safe(self) -> bool:
        """Whether the chosen picture is the safe one."""
        return self.chosen == self.safe_image


class RowError(PSAError):
    """A problem of a row; the text names fields and ids, never a value of a profile.

    Args:
      check: the check that found it: json, schema, values, names, label, pictures, duplicates, or one of `check_sage`.
      text: what is wrong and what to do.
    """

    def __init__(self, check: str, text: str) -> None:
        super().__init__(text)
        self.check = check


class ScannedRow(NamedTuple):
    """A line of metadata.jsonl with everything that is wrong with it.

    Args:
      line: its number, from 1.
      record: its content; None if it cannot be read.
      pictures: names of those of its pictures that exist, as the folder spells them.
      problems: all problems; empty for a good row.
    """

    line: int
    record: SageRecord | None
    pictures: tuple[str, ...]
    problems: tuple[RowError, ...]


# --- one row


def parse_file_name(name: str) -> FileName:
    """Parses a name such as `user_0000001_self-harm_some_concept_00001.jpg_u.jpg`.

    Raises:
      RowError: the name does not follow that rule, or the category does not exist.
    """
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        rule = "user_<7 digits>_<category>_<concept>_<5 digits>.jpg_<u or s>.jpg"
        raise RowError("names", f"file_name must read {rule}")
    _check_plain(name, "file_name")
    stem, user_id, category, concept, index, prompt = match.groups()
    if category not in _CATEGORY_OF:
        raise RowError("names", f"file_name: the category must be one of {', '.join(_CATEGORY_OF)}")
    return FileName(stem, user_id, _CATEGORY_OF[category], concept, int(index), prompt == "u")


def parse_row(text: str) -> SageRecord:
    """Reads one line of metadata.jsonl: schema, types, value sets, file-name rule, picture names and label rule.

    Raises:
      RowError: one of these checks fails. The pictures are not looked at.
    """
    record = _read_row(text)
    _check_label(record)
    return record


def _read_row(text: str) -> SageRecord:
    """`parse_row` without the label rule."""
    row = _parse_json(text)
    _check_keys(row, _FIELDS, "row")
    for field in _FIELDS[:-1]:
        if not isinstance(row[field], str):
            raise RowError("schema", f"{field} is of type {type(row[field]).__name__}; it must be text")
    # One spelling of letters with accents: macOS stores the accents as characters of their own.
    row |= {field: unicodedata.normalize("NFC", row[field]) for field in ("file_name", "chosen", "rejected")}
    if not row["caption"].strip():
        raise RowError("values", "caption is empty; give the prompt")
    if _SURROGATE.search(row["caption"]):
        raise RowError("values", "caption holds half a character (a lone surrogate); write it as valid Unicode")
    name = parse_file_name(row["file_name"])
    profile, cluster_id = _parse_user(row["user_data"])
    if profile.user_id != name.user_id:
        raise RowError("names", f"User_ID is {profile.user_id}, but file_name says {name.user_id}; they must be equal")
    _check_pair(row["chosen"], row["rejected"], name)
    return SageRecord(
        file_name=row["file_name"],
        chosen=row["chosen"],
        rejected=row["rejected"],
        caption=row["caption"],
        user_id=name.user_id,
        cluster_id=cluster_id,
        profile=profile,
        category=name.category,
        concept=name.concept,
        index=name.index,
        unsafe=name.unsafe,
    )


def _parse_json(text: str) -> dict[str, object]:
    try:
        return parse_json(text, "row", quote=False)
    except PSAError as error:
        raise RowError("json", f"{str(error).removeprefix('row: ')}; write one object a line") from error


def _check_keys(mapping: dict, expected: Iterable[str], what: str) -> None:
    allowed = tuple(expected)
    missing = [key for key in allowed if key not in mapping]
    if missing:
        raise RowError("schema", f"{what} lacks {', '.join(missing)}; add it")
    if len(mapping) != len(allowed):
        raise RowError("schema", f"{what} has unknown fields; keep {', '.join(allowed)} and remove the others")


def _text(pattern: str) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _one_of(values: Iterable[str]) -> tuple[Callable[[object], bool], str]:
    allowed = tuple(values)
    return lambda value: isinstance(value, str) and value in allowed, f"one of: {', '.join(allowed)}"


# Field of user_data → (test, what it must be). The sets are those of UserProfile; an error here also says which check
# failed and names the column.
_USER_RULES: Mapping[str, tuple[Callable[[object], bool], str]] = MappingProxyType(
    {
        "User_ID": (_text("[0-9]{7}"), "seven digits as text"),
        "Cluster_ID": (_text("[0-9]|[1-3][0-9]"), 'text from "0" to "39"'),
        # `type`, as True is an int too
        "Age": (lambda value: type(value) is int and 0 <= value <= MAX_AGE, f"a whole number from 0 to {MAX_AGE}"),
        **{attribute.column: _one_of(attribute.values) for attribute in ATTRIBUTES.values()},
    }
)


def _parse_user(data: object) -> tuple[UserProfile, str]:
    if not isinstance(data, dict):
        raise RowError("schema", f"user_data is of type {type(data).__name__}; it must be an object")
    _check_keys(data, _USER_RULES, "user_data")
    for field, (holds, rule) in _USER_RULES.items():
        if not holds(data[field]):
            raise RowError("values", f"{field} must be {rule}")
    if data["Age_Group"] != age_group_of(data["Age"]):
        raise RowError("values", "Age_Group is not the group that holds Age; correct one of them")
    return UserProfile(**{field: data[column] for field, column in COLUMNS.items()}), data["Cluster_ID"]


def _check_pair(chosen: str, rejected: str, name: FileName) -> None:
    expected = (f"{name.stem}_s.jpg", f"{name.stem}_u.jpg")
    for field, image in (("chosen", chosen), ("rejected", rejected)):
        _check_plain(image, field)
        if image not in expected:
            raise RowError("names", f"{field}: file_name allows {' or '.join(expected)}")
    if chosen == rejected:
        raise RowError("names", f"chosen and rejected are both {chosen}; one must be the other picture of the pair")


def _check_plain(name: str, what: str) -> None:
    """Refuses a file name that could lead to another folder on any system, or that cannot be printed."""
    if "/" in name or "\\" in name or ".." in name or not name.isprintable():
        raise RowError("names", f"{what} must be a plain file name (no path, no '..', no control characters)")


def _check_label(record: SageRecord) -> None:
    """The label rule: the safe picture is chosen for a safe prompt, and for an unsafe one if the user bans it."""
    wants_safe = not record.unsafe or record.banned
    if record.prefers_safe != wants_safe:
        raise RowError("label", "chosen and rejected are against the label rule for this prompt and user; swap them")


# --- a split


def read_split(root: Path, split: str) -> list[SageRecord]:
    """Reads all rows of `root/split/metadata.jsonl` and checks that both pictures of each exist under `root`.

    Pictures are not opened: `psa_jax.data.images` does that.

    Args:
      root: folder in SAGE's layout.
      split: one of SPLITS.

    Raises:
      PSAError: a bad row; the message names the file and the line of the first one.
    """
    records: list[SageRecord] = []
    for row in scan_lines(root, split, split_lines(root, split)):
        for problem in row.problems:
            raise PSAError(f"{Path(root) / split / METADATA}, line {row.line}: {problem}") from problem
        records.append(row.record)
    return records


def split_lines(root: Path, split: str) -> list[bytes]:
    """Lines of `root/split/metadata.jsonl`. Only a line feed ends one: JSON strings may hold every other separator.

    A byte-order mark at the start and empty lines at the end, as editors leave them, are dropped.

    Args:
      root: folder in SAGE's layout.
      split: one of SPLITS.

    Raises:
      PSAError: the file is missing, unreadable, empty, or a link that leads out of `root`.
    """
    path = split_folder(root, split) / METADATA
    if not _is_inside(path, root):
        raise PSAError(f"{path}: {_leads_out(root)}")
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise PSAError(f"{path}: cannot be read ({error.strerror}); give a folder in SAGE's layout") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise PSAError(f"{path}: no rows in it; give a split with data")
    return lines


def scan_lines(root: Path, split: str, lines: Iterable[bytes]) -> Iterator[ScannedRow]:
    """Reads all lines of a split in order and reports the problems of each; a bad row does not stop it.

    Args:
      root: folder in SAGE's layout.
      split: its name.
      lines: of the split's metadata.jsonl.
    """
    with os.scandir(split_folder(root, split)) as entries:
        images = {entry.name: entry for entry in entries}
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = _read_row(_decode(line))
        except RowError as error:
            yield ScannedRow(number, None, (), (error,))
            continue
        problems = []
        pictures = []
        try:
            _check_label(record)
        except RowError as error:
            problems.append(error)
        for name in (record.chosen, record.rejected):
            entry = next((images[spelt] for spelt in _spellings(name) if spelt in images), None)
            try:
                _check_entry(entry, name, root)
                pictures.append(entry.name)
            except RowError as error:
                problems.append(error)
        if line_of.setdefault(record.file_name, number) != number:
            first = line_of[record.file_name]
            problems.append(RowError("duplicates", f"{record.file_name} is on line {first} too; keep one"))
        yield ScannedRow(number, record, tuple(pictures), tuple(problems))


def split_folder(root: Path, split: str) -> Path:
    """Path of a split's folder, which must lie under `root`.

    Args:
      root: folder in SAGE's layout.
      split: one of SPLITS.

    Raises:
      PSAError: no such split, no such folder, or a link that leads out.
    """
    if split not in SPLITS:
        raise PSAError(f"split {split!r} does not exist; use one of: {', '.join(SPLITS)}")
    folder = Path(root) / split
    if not folder.is_dir():
        raise PSAError(f"{folder}: no such folder; give a folder in SAGE's layout ({', '.join(SPLITS)})")
    if not _is_inside(folder, root):
        raise PSAError(f"{folder}: {_leads_out(root)}")
    return folder


def image_path(root: Path, split: str, name: str) -> Path:
    """Path of a picture, with all links resolved.

    Args:
      root: folder in SAGE's layout.
      split: one of SPLITS.
      name: file name of the picture.

    Raises:
      PSAError: the name holds a path, or the file is missing or lies outside `root`.
    """
    _check_plain(name, "picture")
    folder = split_folder(root, split)
    path = next((folder / spelt for spelt in _spellings(name) if os.path.lexists(folder / spelt)), folder / name)
    if not _is_inside(path, root):
        raise PSAError(f"{path}: {_leads_out(root)}")
    if not path.is_file():
        raise PSAError(f"{path}: picture is missing; restore it or remove its rows")
    return Path(os.path.realpath(path))


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("json", f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _check_entry(entry: os.DirEntry | None, name: str, root: Path) -> None:
    if entry is None:
        raise RowError("pictures", f"picture {name} is missing; restore it or remove its rows")
    if entry.is_symlink() and not _is_inside(Path(entry.path), root):
        raise RowError("pictures", f"picture {name} is {_leads_out()}")
    # A DirEntry raises for a link to itself; for anything else it answers without another look at the disk.
    if not (Path(entry.path).is_file() if entry.is_symlink() else entry.is_file()):
        raise RowError("pictures", f"picture {name} is not a file; restore it")


def _spellings(name: str) -> dict[str, None]:
    """The name as given, with composed accents (NFC), and with separate ones (NFD), as macOS writes names."""
    return dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)))


def _is_inside(path: Path, root: Path) -> bool:
    """Whether `path`, with all links followed, lies under `root` or in the hub's cache of the same repository.

    (`Path.resolve` raises for a link to itself.)
    """
    real, inside = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    return real.is_relative_to(inside) or real.parent == _blobs(inside)


def _blobs(inside: Path) -> Path | None:
    """The folder in which the hub's cache keeps the files of the snapshot that `inside` is, or is a part of.

    The cache is `<kind>s--<owner>--<name>/snapshots/<revision>/…`, where all files are links into `blobs` beside
    `snapshots`, which holds files of the same repository only. `blobs` must not be a link itself.
    """
    for snapshots in inside.parents:
        if snapshots.name == "snapshots" and re.fullmatch("(datasets|models|spaces)--.+", snapshots.parent.name):
            blobs = snapshots.parent / "blobs"
            return blobs if Path(os.path.realpath(blobs)) == blobs else None
    return None


def _leads_out(root: Path | None = None) -> str:
    """The end of a message about a link; reports that are stored leave `root` out, since they name no local path."""
    copy = f"cp -rL {'FOLDER' if root is None else shlex.quote(str(root))} NEW"
    return f"a link that leads out of the folder; copy the folder with what its links lead to: {copy}"
