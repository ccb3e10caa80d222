"""The two prompts of a pair: a row with the unsafe prompt finds the one with the safe prompt."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from psa_jax.data.rows import Row
from psa_jax.data.sage import SageRecord, image_path, read_split

NO_TWIN = -1


def safe_rows(records: Sequence[SageRecord]) -> Int32[np.ndarray, " n"]:
    """For each row the row with the safe prompt of its pair, joined by the stem of their names, not by their order.

    Args:
      records: the n rows of a split.

    Returns:
      Row numbers: a row with a safe prompt is its own; NO_TWIN where the split lacks the safe prompt.
    """
    safe = {record.stem: row for row, record in enumerate(records) if not record.unsafe}
    return np.asarray(
        [safe.get(record.stem, NO_TWIN) if record.unsafe else row for row, record in enumerate(records)], np.int32
    )


def read_sage(folder: Path, splits: Sequence[str]) -> dict[str, list[Row]]:
    """Reads the rows of some splits of a folder in SAGE's layout, each with the safe prompt of its pair.

    Args:
      folder: in SAGE's layout.
      splits: names.

    Raises:
      PSAError: a bad row, or a picture that is missing or lies outside the folder.
    """
    rows = {}
    for split in splits:
        records = read_split(folder, split)
        # Every pair occurs under two prompts, so every picture occurs twice.
        paths = {name: image_path(folder, split, name) for r in records for name in (r.safe_image, r.unsafe_image)}
        rows[split] = [
            Row(
                name=record.file_name,
                caption=record.caption,
                chosen=record.chosen,
                rejected=record.rejected,
                pictures={name: paths[name] for name in (record.safe_image, record.unsafe_image)},
                user_id=record.user_id,
                category=record.category,
                unsafe=record.unsafe,
                banned=record.banned,
                safe_caption=None if twin == NO_TWIN else records[twin].caption,
            )
            for record, twin in zip(records, safe_rows(records).tolist(), strict=True)
        ]
    return rows
