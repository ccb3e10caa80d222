"""Runs of a comparison, made up."""

import numpy as np

from psa_jax.evaluation.protocol import Verdicts
from psa_jax.mini.comparison import Method, Result
from psa_jax.mini.protocol import MiniCase
from psa_jax.tools.configs import read_config

CASES = [
    MiniCase(str(i % 5), f"prompt {i}", "Violence", i % 4 > 0, i % 2 == 0, "gun", None, False, False) for i in range(40)
]
EDIT = Method("edit", "swap", 540)
SWAP, DPO = read_config("tiny"), read_config("tiny:dpo")


def result(seed: int, method: Method = EDIT) -> Result:
    """A run whose verdicts are drawn."""
    bits = np.random.default_rng(seed).random((3, len(CASES))) < 0.8
    return Result(method, seed, {"usual": Verdicts(*bits)}, 0.9 + seed / 100, 12.5)
