"""Layouts of folders with preference pairs, which `psa-jax build` reads."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from psa_jax.data.own_pairs import pairs_file, read_own_pairs
from psa_jax.data.rows import SPLITS, Row
from psa_jax.data.sage import METADATA
from psa_jax.data.twins import read_sage
from psa_jax.errors import PSAError


@dataclass(frozen=True)
class Layout:
    """How a folder is laid out.

    Args:
      title: what it holds, for the dataset card.
      terms: whose the prompts and pictures are, for the dataset card.
      file: (folder, split) → the file with the rows of a split.
      place: (folder, split) → what is there if the folder has that split.
      read: (folder, splits) → the rows of each of these splits.
    """

    title: str
    terms: str
    file: Callable[[Path, str], Path]
    place: Callable[[Path, str], Path]
    read: Callable[[Path, Sequence[str]], dict[str, list[Row]]]

    def splits(self, folder: Path) -> list[str]:
        """The splits that a folder has in this layout."""
        return [split for split in SPLITS if os.path.lexists(self.place(folder, split))]


LAYOUTS = (
    Layout(
        "SAGE",
        "SAGE's: SAGE's licence and terms of use hold for this folder as for the original",
        lambda folder, split: Path(folder) / split / METADATA,
        lambda folder, split: Path(folder) / split,
        read_sage,
    ),
    Layout(
        "Preference pairs",
        "their authors': what holds for the originals holds for this folder",
        pairs_file,
        pairs_file,
        read_own_pairs,
    ),
)


def find_layout(folder: Path) -> tuple[Layout, list[str]]:
    """The layout of a folder, and the splits that it has.

    Raises:
      PSAError: none of LAYOUTS, or more than one.
    """
    found = [(layout, splits) for layout in LAYOUTS if (splits := layout.splits(folder))]
    if len(found) == 1:
        return found[0]
    if found:
        raise PSAError(f"{folder}: has both SAGE's folders and files of own pairs; give a folder with one of them")
    raise PSAError(
        f"{folder}: none of the folders {', '.join(SPLITS)} is there, nor a file such as train.jsonl; give a folder in "
        "SAGE's layout, or one with own pairs"
    )
