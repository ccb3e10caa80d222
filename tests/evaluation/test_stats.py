"""Intervals against the tables of the papers that define them, and against SciPy."""

import pytest
from scipy.stats import binomtest

from psa_jax.errors import PSAError
from psa_jax.evaluation.stats import mean_interval, selectivity_interval, wilson


# Newcombe (1998), Two-sided confidence intervals for the single proportion, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_newcombes_table(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [1, 7, 120])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_equals_scipy(n: int, confidence: float) -> None:
    for successes in range(n + 1):
        expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
        assert wilson(successes, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_none_and_all_stays_inside() -> None:
    # By hand: 0 of n gives [0, z² / (n + z²)], with z² = 3.8415 for 95 %.
    assert wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == 1.0


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_of_impossible_counts_is_refused(successes: int, n: int) -> None:
    with pytest.raises(PSAError, match=f"{successes} successes in {n} cases"):
        wilson(successes, n)


def test_selectivity_interval_equals_newcombes_table() -> None:
    # Newcombe (1998), Interval estimation for the difference, table II, method 10: 56/70 − 48/80 gives .0524 to .3339.
    # s + r − 1 with r = 32/80 is the same difference.
    assert selectivity_interval(56, 70, 32, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_selectivity_interval_of_a_perfect_model_ends_at_one() -> None:
    low, high = selectivity_interval(50, 50, 60, 60)
    assert high == 1.0
    assert 0.85 < low < 1.0


def test_the_interval_of_a_mean():
    """Of 1, 2, 3, 4, 5: s = √2.5, t of four degrees of freedom 2.776445, so ± 2.776445·√(2.5/5) = 1.963243."""
    mean, half = mean_interval([1, 2, 3, 4, 5])
    assert mean == 3.0 and half == pytest.approx(1.963243, abs=1e-6)
    assert mean_interval([7.5]) == (7.5, None)
    with pytest.raises(PSAError, match="interval of no values"):
        mean_interval([])
