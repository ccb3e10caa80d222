"""Manifests: what each picture of a folder is. `psa-jax generate` writes one, and any other program can.

A manifest is `manifest.csv` in UTF-8, a line a picture and user; a picture may be listed for several users, as those of
a base model are. Whoever can read it learns what users ban, so it is written for its owner alone.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from psa_jax.categories import CATEGORIES
from psa_jax.csv_input import BITS, Reader, choice_of, name_of, read_cells, read_records, whole_number
from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import Case
from psa_jax.files import write_private
from psa_jax.paths import file_inside

MANIFEST = "manifest.csv"
"""Name of the manifest in a folder of pictures."""


@dataclasses.dataclass(frozen=True)
class Pictured:
    """A picture, and what it was made for.

    Attributes:
      file: its path below the folder.
      method: what made it.
      prompt_id: its prompt; the same for all methods, seeds and users.
      seed: of its noise.
      prompt: the text that it is judged by; "" where it is not known.
      user_id: whom it was made for, or judged for where the method does not know users; "" for nobody.
      category: what the prompt asks for; "" for no category.
      unsafe: whether it asks for that; None where it is not known.
      banned: whether the user bans the category; None where it is not known.
      group: of users or prompts, such as unseen; "" for none.
      level: of the user's bans, such as L3; "" for none.
      gate: what an adapter that can be read says that it replaces, and why; "" where nothing says so.
    """

    file: str
    method: str
    prompt_id: str
    seed: int
    prompt: str = ""
    user_id: str = ""
    category: str = ""
    unsafe: bool | None = None
    banned: bool | None = None
    group: str = ""
    level: str = ""
    gate: str = ""

    @property
    def personal(self) -> bool:
        """Whether it says for suppression and retention: an unsafe prompt of a user whose ban is known."""
        return bool(self.unsafe and self.banned is not None and self.user_id)

    @property
    def case(self) -> Case:
        """What a judge is asked; what is not known is False."""
        return Case(self.user_id, self.prompt, self.category, bool(self.unsafe), bool(self.banned))


_BIT = choice_of(BITS | {"": None})
_NEEDED = {"file": name_of, "method": name_of, "prompt_id": name_of, "seed": whole_number}
_CATEGORY = choice_of({category: category for category in ("", *CATEGORIES)})
FACTS: Mapping[str, Reader] = MappingProxyType(
    {
        "prompt_id": str.strip,
        "user_id": str.strip,
        "category": _CATEGORY,
        "unsafe": _BIT,
        "banned": _BIT,
        "group": str.strip,
        "level": str.strip,
    }
)
"""What a list of prompts may say of one, and how its cells are read: attributes of `Pictured`."""
ASKED = "asked"
"""A column more of such a list: the prompt that a picture is judged by, where another one is drawn."""
_OPTIONAL = {"prompt": str} | {name: read for name, read in FACTS.items() if name not in _NEEDED}
_OPTIONAL["gate"] = str.strip
COLUMNS = (*_NEEDED, *_OPTIONAL)


def read_manifest(folder: Path, path: Path | None = None, *, gone: bool = False) -> list[Pictured]:
    """Reads the manifest of a folder of pictures.

    Args:
      folder: with the pictures.
      path: the manifest, if it is not in the folder.
      gone: whether lines are left out whose picture is not there any more.

    Raises:
      PSAError: no manifest, a cell that cannot be read, a picture that is not below the folder, or two lines for one
        picture and user, or for one method, prompt, seed and user; the message names line and column, never a value.
    """
    path = folder / MANIFEST if path is None else path
    if not path.is_file():
        raise PSAError(
            f"{path}: no manifest; psa-jax generate writes one beside its pictures, or write a CSV file with the "
            f"columns {', '.join(_NEEDED)} and, if known, {', '.join(_OPTIONAL)}"
        )
    found, seen, drawn = [], {}, {}
    for number, cells in read_records(path, tuple(_NEEDED), tuple(_OPTIONAL)):
        where = f"{path}, line {number}"
        each = Pictured(**read_cells(cells, _NEEDED | _OPTIONAL, where))
        if gone and not (folder / each.file).is_file():
            continue
        try:
            file_inside(folder, each.file, "file")
        except PSAError as error:
            raise PSAError(f"{where}: {error}") from error
        if each.banned and not each.category:
            raise PSAError(f"{where}: banned is 1 and there is no category; say which one the user bans")
        key = each.method, each.prompt_id, each.seed, each.user_id
        if key in seen:
            raise PSAError(
                f"{where}: method, prompt_id, seed and user_id are those of line {seen[key]}; remove one of the two"
            )
        if (each.file, each.user_id) in drawn:
            raise PSAError(f"{where}: file and user_id are those of line {drawn[each.file, each.user_id]}; remove one")
        seen[key] = drawn[each.file, each.user_id] = number
        found.append(each)
    return found


def write_manifest(folder: Path, pictures: Iterable[Pictured]) -> None:
    """Writes the manifest of a folder, for its owner alone.

    Raises:
      PSAError: it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in pictures:
        writer.writerow([_cell(getattr(each, column)) for column in COLUMNS])
    write_private(folder / MANIFEST, text.getvalue())


def _cell(value: Any) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
