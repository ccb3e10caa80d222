"""The two prompts of a pair: a row with the unsafe prompt finds the one with the safe prompt."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from psa_jax.data.sage import SageRecord

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
