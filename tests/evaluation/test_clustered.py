"""Intervals of clustered cases: by hand, against a bootstrap of users, and where there are no clusters."""

import numpy as np
import pytest

from psa_jax.errors import PSAError
from psa_jax.evaluation.clustered import clustered_rates, clustered_share
from psa_jax.evaluation.protocol import Case, Verdicts, rates
from psa_jax.evaluation.stats import wilson


def test_two_clusters_by_hand():
    """3 of 4 and 1 of 4: p̂ = 1/2, variance 2·(1² + 1²)/8² = 1/16, which is twice ¼/8: the interval of 2 of 4."""
    share, low, high = clustered_share(np.array([1, 1, 1, 0, 1, 0, 0, 0], bool), np.array(list("aaaabbbb")))
    assert share == 0.5
    assert (low, high) == pytest.approx(wilson(2, 4), abs=1e-12)


def test_cases_of_a_user_each_are_not_clustered():
    hits = np.arange(40) % 3 == 0
    found = clustered_share(hits, np.arange(40))
    # Only the factor 40/39 of the small sample remains.
    assert found == pytest.approx((14 / 40, *wilson(14 * 39 / 40, 39)), abs=1e-12)


def test_where_nothing_varies_clusters_are_the_cases():
    """Nothing is known of how the cases of a user go together: ten of five users are five."""
    users = np.array(list("aabbccddee"))
    assert clustered_share(np.ones(10, bool), users) == pytest.approx((1.0, *wilson(5, 5)), abs=1e-12)
    assert clustered_share(np.zeros(10, bool), users) == pytest.approx((0.0, *wilson(0, 5)), abs=1e-12)
    assert clustered_share(np.arange(10) < 5, np.zeros(10, int)) == pytest.approx((0.5, *wilson(0.5, 1)), abs=1e-12)


def test_repeating_every_case_adds_no_certainty():
    """Three seeds that agree in every verdict are no more cases than one."""
    rng = np.random.default_rng(0)
    users = np.arange(120) // 2
    for hits in (rng.random(120) < 0.8, np.ones(120, bool)):
        once, thrice = clustered_share(hits, users), clustered_share(np.tile(hits, 3), np.tile(users, 3))
        assert thrice == pytest.approx(once, abs=1e-12)


def test_its_width_is_that_of_a_bootstrap_of_users():
    rng = np.random.default_rng(1)
    levels = rng.beta(4, 1, size=60)  # users differ, so that their cases go together
    hits = np.concatenate([rng.random(8) < level for level in levels])
    users = np.repeat(np.arange(60), 8)
    share, low, high = clustered_share(hits, users)
    counts = hits.reshape(60, 8).sum(1)
    means = np.array([rng.choice(counts, 60).mean() / 8 for _ in range(4000)])
    expected = np.quantile(means, [0.025, 0.975])
    assert share == hits.mean()
    assert (high - low) == pytest.approx(expected[1] - expected[0], rel=0.08)
    plain = wilson(int(hits.sum()), 480)
    assert (high - low) > 1.5 * (plain[1] - plain[0])  # what ignoring the users would have claimed


def test_no_cases_are_refused():
    with pytest.raises(PSAError, match="no cases"):
        clustered_share(np.zeros(0, bool), np.zeros(0, int))


def test_rates_are_the_protocols():
    rng = np.random.default_rng(2)
    cases = [Case(str(i % 7), f"prompt {i}", "Violence", unsafe=i % 3 > 0, banned=i % 2 == 0) for i in range(60)]
    verdicts = Verdicts(*(rng.random((3, 60)) < 0.7))
    plain, found = rates(verdicts, cases), clustered_rates(verdicts, cases)
    for name, (value, low, high) in found.items():
        assert value == pytest.approx(plain[name])
        assert low < value < high


def test_a_rate_of_no_cases_is_none():
    cases = [Case("1", "a", "Violence", unsafe=True, banned=True), Case("2", "b", "Hate", unsafe=True, banned=True)]
    found = clustered_rates(Verdicts(*np.array([[True, False], [True, True], [True, True]])), cases)
    assert found["retention"] is None and found["selectivity"] is None and found["benign_fidelity"] is None
    assert found["suppression"][0] == 50.0
