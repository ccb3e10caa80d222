"""Bans of one's own: whether an adapter acts on them, which not every adapter has learnt.

The ban rules tie what a user bans to the other attributes. An adapter that has seen only such users may read the age
and not the bits: a ban that a user adds would then do nothing, in silence. With the gate by categories it can be asked;
what cannot be asked is refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import read_tensors
from psa_jax.profiles import gate_program
from psa_jax.profiles.encoders import FeatureEncoder
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.profiles.table import OWN_BANS_NOTE, EmbeddingTable

_ADVICE = "train one with adapter.gate=categories, which is fitted on such bans, or leave them out"


def ban_columns(table: EmbeddingTable) -> list[int] | None:
    """For each category the column of a table that says whether it is banned; None without such columns."""
    encoder = FeatureEncoder()
    if table.fingerprint != encoder.fingerprint:
        return None
    return [encoder.fields.index(f"bans={category}") for category in CATEGORIES]


def check_own_bans(
    adapter: Path, about: Mapping[str, Any], embedding: Float[np.ndarray, "1 d"], bans: Sequence[str]
) -> None:
    """Checks that an adapter acts on every ban that a profile states.

    Args:
      adapter: its file.
      about: its metadata.
      embedding: of the profile.
      bans: categories that the profile states.

    Raises:
      PSAError: it does not act on one of them, or cannot be asked.
    """
    stated = np.asarray([[category in bans for category in CATEGORIES]])
    if stated.any() and (about.get("gate") != "categories" or (stated & ~_gate_says(adapter, embedding)).any()):
        raise PSAError(f"{adapter}: this adapter is not sure to act on the bans that the profile states; {_ADVICE}")


def check_table_with_own_bans(adapter: Path, about: Mapping[str, Any], table: EmbeddingTable) -> None:
    """Checks that an adapter acts on every ban of a table's users, if some of them state bans of their own.

    An adapter without the gate by categories must have been trained on such a table.

    Args:
      adapter: its file.
      about: its metadata.
      table: of the adapter's encoder.

    Raises:
      PSAError: it does not act on one of them, or cannot be asked.
    """
    if OWN_BANS_NOTE not in table.notes:
        return
    columns = ban_columns(table)
    if about.get("gate") != "categories" or columns is None:
        holds = about.get(OWN_BANS_NOTE) is True
    else:
        raw = table.embeddings if table.mean is None else table.embeddings * table.std[None] + table.mean[None]
        holds = not ((raw[:, columns] > 0.5) & ~_gate_says(adapter, table.embeddings)).any()
    if not holds:
        raise PSAError(
            f"{adapter}: this adapter is not sure to act on the bans that users of the table state; {_ADVICE}"
        )


def _gate_says(adapter: Path, embeddings: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, "n k"]:
    """Whether the user half of the adapter's gate says that these users ban each category."""
    tensors = read_tensors(adapter)
    weights = {name.removeprefix("user_gate."): array for name, array in tensors.items()}
    return np.asarray([gate_program.answers(weights, row) for row in embeddings]) > 0.5
