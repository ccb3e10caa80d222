"""Differences with intervals that count clusters, against closed forms."""

import numpy as np
import pytest

from psa_jax.errors import PSAError
from psa_jax.evaluation.paired import clustered_difference


def test_one_case_for_each_cluster_is_the_textbook_interval():
    random = np.random.default_rng(3)
    ours, theirs = random.random(400) < 0.7, random.random(400) < 0.5
    users = np.arange(400)
    found, low, high = clustered_difference(ours, users, theirs, users)
    each = ours.astype(float) - theirs
    half = 1.96 * each.std(ddof=1) / 20
    assert found == pytest.approx(each.mean())
    assert (low, high) == (pytest.approx(found - half, abs=0.01), pytest.approx(found + half, abs=0.01))


def test_cases_of_one_user_count_once():
    """Ten times the same cases of each user say no more."""
    random = np.random.default_rng(4)
    ours, theirs, users = random.random(60) < 0.8, random.random(60) < 0.4, np.arange(60)
    once = clustered_difference(ours, users, theirs, users)
    often = clustered_difference(ours.repeat(10), users.repeat(10), theirs, users)
    np.testing.assert_allclose(once, often, atol=1e-12)


def test_what_users_have_in_common_cancels():
    """Ours is right wherever theirs is, and in one case more for each user, however users differ."""
    hits = np.arange(20)[:, None] > np.arange(20)[None]  # user i: i of 20
    ours = np.arange(20)[:, None] >= np.arange(20)[None]
    users = np.arange(20).repeat(20)
    np.testing.assert_allclose(clustered_difference(ours.ravel(), users, hits.ravel(), users), [1 / 20] * 3)


def test_few_clusters_and_bad_ones():
    one = np.zeros(3, int)
    assert clustered_difference(np.ones(3, bool), one, np.zeros(3, bool), one) == (1.0, -1.0, 1.0)
    for users in (np.array([0, 0, 1]), np.zeros(0, int)):
        with pytest.raises(PSAError, match="cases of the same users for both"):
            clustered_difference(np.ones(len(users), bool), users, np.ones(0, bool), np.zeros(0, int))
