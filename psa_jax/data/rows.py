"""A row of training data, whatever layout it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val", "test_seen", "test_unseen")
"""Names of splits."""
PROMPT_KINDS = ("safe", "unsafe")
"""Names of the two kinds of prompts in files and reports: `PROMPT_KINDS[row.unsafe]`."""
NO_CATEGORY = -1
"""The number of the category of a row without one, in shards."""


@dataclass(frozen=True)
class Row:
    """A prompt, the picture that its user prefers and the one that they do not.

    Args:
      name: of the row, for errors.
      caption: the prompt.
      chosen, rejected: names of the pictures, keys of `pictures`.
      pictures: name → path, in the order in which they are encoded.
      user_id: seven digits.
      category: one of the seven, or None where it is not known.
      unsafe: whether some user bans what the prompt asks for.
      banned: whether this user does.
      safe_caption: the prompt of a safe picture in its place, a safe prompt's own; None where it is not known.
    """

    name: str
    caption: str
    chosen: str
    rejected: str
    pictures: Mapping[str, Path]
    user_id: str
    category: str | None
    unsafe: bool
    banned: bool
    safe_caption: str | None
