"""The balance of rows, worked by hand and on rows of real users."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from psa_jax.data import balancing
from psa_jax.data.shards import Shards, open_shards
from psa_jax.errors import PSAError


@pytest.fixture(scope="module")
def shards(shard_dir: Path) -> Shards:
    return open_shards(shard_dir, "train")


def test_balance_by_hand():
    """Category 0: 1 row bans, 3 allow. Category 1: 2 ban, 2 allow. 4 safe rows, a third of all."""
    categories = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1])
    unsafe = np.array([True] * 8 + [False] * 4)
    banned = np.array([True, False, False, False, True, True, False, False, True, False, True, False])
    order = balancing.balanced_order(categories, unsafe, banned, safe_share=1 / 3, seed=0)
    count = Counter(order.tolist())
    # 3 + 3 in category 0, 2 + 2 in category 1: 10 unsafe rows, so 5 safe ones
    assert [count[row] for row in range(8)] == [3, 1, 1, 1, 1, 1, 1, 1]
    assert sorted(count[row] for row in range(8, 12)) == [1, 1, 1, 2]
    assert len(order) == 15
    again = balancing.balanced_order(categories, unsafe, banned, safe_share=1 / 3, seed=0)
    np.testing.assert_array_equal(order, again)
    other = balancing.balanced_order(categories, unsafe, banned, safe_share=1 / 3, seed=1)
    assert order.tolist() != other.tolist()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.8])
def test_balance_on_rows_of_real_users(shards: Shards, share: float):
    columns = shards.columns
    order = balancing.balanced_order(columns.categories, columns.unsafe, columns.banned, share, seed=3)
    unsafe, banned, categories = columns.unsafe[order], columns.banned[order], columns.categories[order]
    for category in range(7):
        here = unsafe & (categories == category)
        assert (here & banned).sum() == (here & ~banned).sum() > 0
    assert abs(unsafe.mean() - (1 - share)) < 0.5 / len(order) + 1e-12
    used = set(order.tolist())
    assert used == set(range(len(shards))) if share else used == set(np.flatnonzero(columns.unsafe).tolist())
    for category in range(7):  # repetitions inside a group differ by at most one
        for ban in (True, False):
            rows = np.flatnonzero(columns.unsafe & (columns.categories == category) & (columns.banned == ban))
            repeats = [(order == row).sum() for row in rows]
            assert max(repeats) - min(repeats) <= 1


def test_what_cannot_be_balanced():
    unsafe, categories = np.array([True, True, False]), np.zeros(3, np.int32)
    with pytest.raises(PSAError, match="allows Harassment"):
        balancing.balanced_order(categories, unsafe, np.array([True, True, True]))
    with pytest.raises(PSAError, match="bans Harassment"):
        balancing.balanced_order(categories, unsafe, np.array([False, False, True]))
    with pytest.raises(PSAError, match="safe prompts"):
        balancing.balanced_order(categories, np.array([True] * 3), np.array([True, False, True]))
    with pytest.raises(PSAError, match="unsafe prompts"):
        balancing.balanced_order(categories, np.array([False] * 3), np.array([True, False, True]))
    with pytest.raises(PSAError, match="share"):
        balancing.balanced_order(categories, unsafe, np.array([True, False, True]), safe_share=1.0)
