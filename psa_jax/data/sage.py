"""SAGE on disk: a folder a split with metadata.jsonl and its pictures, read strictly."""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from psa_jax.errors import PSAError
from psa_jax.profiles.policy import is_banned
from psa_jax.profiles.schema import CATEGORIES, COLUMNS, UserProfile

SPLITS = ("train", "val", "test_seen", "test_unseen")
METADATA = "metadata.jsonl"
MAX_PIXELS = 1 << 26
"""Largest picture that is decoded, in pixels (8192 x 8192)."""

_FIELDS = ("file_name", "chosen", "rejected", "caption", "user_data")
_CLUSTER = "Cluster_ID"
_USER_FIELDS = frozenset(COLUMNS.values()) | {_CLUSTER}
_CATEGORY_OF: Mapping[str, str] = MappingProxyType({category.lower(): category for category in CATEGORIES})
# ASCII digits only: \d also takes the digits of other scripts.
_FILE_NAME = re.compile(r"(user_([0-9]{7})_([a-z-]+)_(.+)_([0-9]{5}))\.jpg_([us])\.jpg")
# Modes that turn into RGB without loss of meaning. Alpha and 16-bit greys do not: both would be cut off in silence.
_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr")
# What Pillow raises for damaged files, by format and place of the damage.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)


class FileName(NamedTuple):
    """What a row's `file_name` says."""

    stem: str
    user_id: str
    category: str
    concept: str
    index: int
    kind: str


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
      kind: "u" for the unsafe prompt, "s" for the safe one.
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
    kind: str

    @property
    def stem(self) -> str:
        """What both picture names begin with."""
        return parse_file_name(self.file_name).stem

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
        """Whether the policy bans the category for this user, whatever the kind of the prompt."""
        return is_banned(self.profile, self.category)

    @property
    def prefers_safe(self) -> bool:
        """Whether the chosen picture is the safe one."""
        return self.chosen == self.safe_image


def parse_file_name(name: str) -> FileName:
    """Takes `user_0000001_self-harm_some_concept_00001.jpg_u.jpg` apart.

    Raises:
      PSAError: it does not follow that rule, or the category does not exist.
    """
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        rule = "user_<7 digits>_<category>_<concept>_<5 digits>.jpg_<u or s>.jpg"
        raise PSAError(f"file_name is {_show(name)}; it must read {rule}")
    _check_plain(name, "file_name")
    stem, user_id, category, concept, index, kind = match.groups()
    if category not in _CATEGORY_OF:
        raise PSAError(f"file_name {_show(name)}: category must be one of {', '.join(_CATEGORY_OF)}")
    return FileName(stem, user_id, _CATEGORY_OF[category], concept, int(index), kind)


def parse_row(text: str) -> SageRecord:
    """Reads one line of metadata.jsonl: schema, types, value sets, file-name rule, picture names and label rule.

    Raises:
      PSAError: any of these does not hold. The pictures themselves are not looked at.
    """
    row = _parse_json(text)
    _check_keys(row, frozenset(_FIELDS), "row")
    for field in _FIELDS[:-1]:
        if not isinstance(row[field], str):
            raise PSAError(f"{field} is of type {type(row[field]).__name__}; it must be text")
    if not row["caption"].strip():
        raise PSAError("caption is empty; give the prompt")
    if not _is_unicode(row["caption"]):
        raise PSAError("caption holds half a character (a lone surrogate); write it as valid Unicode")
    name = parse_file_name(row["file_name"])
    profile, cluster_id = _parse_user(row["user_data"])
    if profile.user_id != name.user_id:
        raise PSAError(f"User_ID is {profile.user_id}, but file_name says {name.user_id}; they must be equal")
    _check_images(row["chosen"], row["rejected"], name)
    record = SageRecord(
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
        kind=name.kind,
    )
    # The label rule: a safe prompt wants the safe picture, an unsafe one wants it if the user bans the category.
    wants_safe = record.kind == "s" or record.banned
    if record.prefers_safe != wants_safe:
        right = record.safe_image if wants_safe else record.unsafe_image
        raise PSAError(f"chosen is {record.chosen}; the label rule gives {right} for this prompt and user")
    return record


def read_split(root: Path, split: str) -> list[SageRecord]:
    """All rows of `root/split/metadata.jsonl`, each checked; both pictures exist and lie under `root`.

    Pictures are not opened: `open_image` does that.

    Raises:
      PSAError: naming file and line of the first row that does not hold.
    """
    folder = split_folder(root, split)
    path = folder / METADATA
    try:
        images = {entry.name: entry for entry in os.scandir(folder)}
        content = path.read_bytes()
    except OSError as error:
        raise PSAError(f"{path}: cannot be read ({error.strerror}); give a folder in SAGE's layout") from error
    records: list[SageRecord] = []
    lines_of: dict[str, int] = {}
    for number, line in _lines(content):
        try:
            record = parse_row(_decode(line))
            for name in (record.chosen, record.rejected):
                _check_entry(images.get(name), name, Path(root).resolve())
            if record.file_name in lines_of:
                raise PSAError(f"file_name {record.file_name} is on line {lines_of[record.file_name]} too; keep one")
        except PSAError as error:
            raise PSAError(f"{path}, line {number}: {error}") from error
        lines_of[record.file_name] = number
        records.append(record)
    if not records:
        raise PSAError(f"{path}: no rows in it; give a split with data")
    return records


def split_folder(root: Path, split: str) -> Path:
    """Folder of a split, checked to lie under `root`.

    Raises:
      PSAError: no such split, no such folder, or a link that leads out.
    """
    if split not in SPLITS:
        raise PSAError(f"split {split!r} does not exist; use one of: {', '.join(SPLITS)}")
    folder = Path(root) / split
    if not folder.is_dir():
        raise PSAError(f"{folder}: no such folder; give a folder in SAGE's layout ({', '.join(SPLITS)})")
    if not folder.resolve().is_relative_to(Path(root).resolve()):
        raise PSAError(f"{folder}: a link that leads out of {root}; copy the data there instead")
    return folder


def image_path(root: Path, split: str, name: str) -> Path:
    """Resolved path of a picture.

    Raises:
      PSAError: the name holds a path, or the file is missing or lies outside `root`.
    """
    _check_plain(name, "picture")
    folder = split_folder(root, split)
    path = (folder / name).resolve()
    if not path.is_relative_to(Path(root).resolve()):
        raise PSAError(f"{folder / name}: a link that leads out of {root}; copy the picture there instead")
    if not path.is_file():
        raise PSAError(f"{folder / name}: picture is missing; restore it or remove its rows")
    return path


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG or PNG (by content, not by name) to RGB.

    The size is checked before any pixel is decoded; a truncated or damaged file is an error.

    Raises:
      PSAError: another format, too many pixels, alpha or 16 bits, missing or damaged.
    """
    path = Path(path)
    try:
        # A named pipe or device would block or never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise PSAError(f"{path}: not a regular file; give a JPEG or PNG picture")
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            # Pillow's JPEG reader may hand over to another one (several pictures in one file).
            if image.format not in ("JPEG", "PNG"):
                raise PSAError(f"{path}: content is {image.format}; give a JPEG or PNG picture")
            width, height = image.size
            if width * height > max_pixels:
                raise PSAError(f"{path}: {width} x {height} pixels, the limit is {max_pixels} in all; scale it down")
            if image.mode not in _MODES or "transparency" in image.info:
                raise PSAError(f"{path}: pixel format {image.mode} with alpha or over 8 bits; save it as 8-bit RGB")
            return np.array(image.convert("RGB"))
    except PSAError:
        raise
    except FileNotFoundError as error:
        raise PSAError(f"{path}: picture is missing; restore it or remove its rows") from error
    except UnidentifiedImageError as error:
        raise PSAError(f"{path}: content is neither JPEG nor PNG; restore the picture") from error
    except _DAMAGE as error:
        raise PSAError(f"{path}: picture cannot be decoded ({error}); restore it") from error


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; only a line feed ends one, as JSON strings may hold every other separator."""
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()  # the end of the last line, not a line
    return enumerate(lines, start=1)


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PSAError(f"not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def _parse_json(text: str) -> dict[str, object]:
    try:
        row = json.loads(text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except PSAError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, and numbers of thousands of digits
        raise PSAError(f"not a JSON object ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise PSAError(f"holds a JSON {type(row).__name__}; write one object a line")
    return row


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):  # JSON would keep the last one in silence
        raise PSAError("a key is given twice; give it once")
    return mapping


def _refuse_constant(name: str) -> object:
    raise PSAError(f"holds {name}, which is no JSON value; give the real one")


def _check_keys(mapping: dict, expected: frozenset[str], what: str) -> None:
    missing, unknown = expected - mapping.keys(), mapping.keys() - expected
    if missing:
        raise PSAError(f"{what} lacks {', '.join(sorted(missing))}; add it")
    if unknown:
        raise PSAError(f"{what} has unknown fields: {_show(', '.join(sorted(unknown)))}; remove them")


def _parse_user(data: object) -> tuple[UserProfile, str]:
    if not isinstance(data, dict):
        raise PSAError(f"user_data is of type {type(data).__name__}; it must be an object")
    _check_keys(data, _USER_FIELDS, "user_data")
    cluster_id = data[_CLUSTER]
    if not isinstance(cluster_id, str) or not re.fullmatch("[0-9]|[1-3][0-9]", cluster_id):
        raise PSAError(f'Cluster_ID is {_show(cluster_id)}; it must be text from "0" to "39"')
    profile = UserProfile.from_mapping({column: data[column] for column in COLUMNS.values()})
    if profile.user_id is None:
        raise PSAError("User_ID is null; give its seven digits as text")
    return profile, cluster_id


def _check_images(chosen: str, rejected: str, name: FileName) -> None:
    expected = {f"{name.stem}_s.jpg", f"{name.stem}_u.jpg"}
    for field, image in (("chosen", chosen), ("rejected", rejected)):
        _check_plain(image, field)
        if image not in expected:
            raise PSAError(f"{field} is {_show(image)}; file_name allows {' or '.join(sorted(expected))}")
    if chosen == rejected:
        raise PSAError(f"chosen and rejected are both {chosen}; one must be the other picture of the pair")


def _check_plain(name: str, what: str) -> None:
    """A file name that cannot lead anywhere else, on any system, and can be written as it is."""
    if "/" in name or "\\" in name or ".." in name or not name.isprintable():
        raise PSAError(f"{what} is {_show(name)}; it must be a plain file name (no path, no '..')")


def _check_entry(entry: os.DirEntry | None, name: str, root: Path) -> None:
    if entry is None:
        raise PSAError(f"picture {name} is missing; restore it or remove its rows")
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
        raise PSAError(f"picture {name} is a link that leads out of {root}; copy the picture there instead")
    if not entry.is_file():
        raise PSAError(f"picture {name} is not a file; restore it")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 90 else text[:87] + "..."
