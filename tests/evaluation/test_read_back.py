"""Attributes read back from numbers: known answers at both ends, and an interval worked by hand."""

import importlib.util

import numpy as np
import pytest

from psa_jax.errors import PSAError
from psa_jax.evaluation.read_back import guessed, read_back, require_classifier

VALUES = [("red", "green", "blue", "blue")[index % 4] for index in range(400)]


def test_what_the_numbers_say_is_read_and_what_they_do_not_say_is_guessed():
    columns = np.array([[value == name for name in ("red", "green")] for value in VALUES], float)
    share, low, high = read_back(columns, VALUES)
    assert share == high == 100.0 and 99.0 < low < 100.0
    noise = np.random.default_rng(0).standard_normal((400, 3))
    share, low, high = read_back(noise, VALUES)
    assert 40 < share < 55 and low < share < high
    assert read_back(noise, VALUES, seed=0) == (share, low, high)
    # A difference of 1e-4 is as plain as one of 1.
    assert read_back(1.0 - 1e-4 * columns, VALUES)[0] == 100.0


def test_a_forest_reads_what_columns_say_together():
    """Whether two signs are equal: neither column says anything by itself."""
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (400, 2))
    values = ["equal" if first == second else "different" for first, second in signs]
    assert read_back(signs, values, by="linear")[0] < 65
    assert read_back(signs, values, by="forest")[0] == 100.0
    assert read_back(signs, values, by="forest") == read_back(signs, values, by="forest")


def test_guessing_by_hand():
    share, low, high = guessed(["a"] * 5 + ["b"] * 3 + ["c"] * 2)
    assert share == 50.0
    z2 = 1.959963984540054**2  # Wilson's interval of 5 in 10: 1/2 ± z/2·√(n + z²)/(n + z²)·…, symmetric
    half = 100 * np.sqrt(z2) * np.sqrt(0.25 / 10 + z2 / 400) / (1 + z2 / 10)
    assert (low, high) == pytest.approx((50 - half, 50 + half))


def test_values_that_too_few_have():
    with pytest.raises(PSAError, match="value of 4 users; give at least 5"):
        read_back(np.zeros((10, 1)), ["a"] * 6 + ["b"] * 4)
    with pytest.raises(PSAError, match="value of 0 users"):
        read_back(np.zeros((0, 1)), [])


def test_without_scikit_learn(monkeypatch):
    require_classifier("psa-jax evaluate limits")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PSAError, match=r"^psa-jax evaluate limits reads .* pip install 'psa_jax\[eval\]'$"):
        require_classifier("psa-jax evaluate limits")
