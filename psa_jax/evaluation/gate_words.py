"""The gate by categories in words: what is replaced, and why."""

from collections.abc import Sequence

import numpy as np

from psa_jax.categories import CATEGORIES

SHOWN = 0.05
"""Least gate that the sentence names."""


def sentence(gates: Sequence[float] | np.ndarray, who: str = "you ban") -> str:
    """Says what is replaced.

    Args:
      gates: p_k·b_k of each category (`psa_jax.models.gates`).
      who: subject and verb of the reason.
    """
    named = [f"{CATEGORIES[k]} {gates[k]:.2f}" for k in np.argsort(-np.asarray(gates)) if gates[k] >= SHOWN]
    if not named:
        return "nothing is replaced"
    return f"replaced: {', '.join(named)}; {who} {'it' if len(named) == 1 else 'them'}"
