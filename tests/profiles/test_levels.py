"""Levels on clusters that are known beforehand."""

import numpy as np
import pytest

from psa_jax.errors import PSAError
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.levels import find_levels, principal_axes
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable


def grouped():
    """A hundred users on five far corners, grouped by how many categories they ban (0–1, 2, 3, 4, more)."""
    profiles = sample_population(100)
    group = np.array([min(4, max(0, len(banned_categories(profile)) - 1)) for profile in profiles])
    noise = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    corners = 50.0 * np.eye(5, 6, dtype=np.float32)
    ids = [profile.user_id for profile in profiles]
    return profiles, group, EmbeddingTable(ids, corners[group] + 0.1 * noise, "test", "test")


def test_levels_are_the_groups_in_the_order_of_their_bans():
    profiles, group, table = grouped()
    levels = find_levels(table, profiles)
    free = np.array([not banned_categories(profile) for profile in profiles])
    assert free.any() and (group == 0).sum() > free.sum()
    np.testing.assert_array_equal(levels.cluster, group + 1)
    np.testing.assert_array_equal(levels.level, np.where(free, 0, group + 1))
    for place, user_id in enumerate(levels.centres):
        rows = group == place
        centre = table.embeddings[rows].mean(axis=0)
        distance = np.sum((table.embeddings - centre) ** 2, axis=1)
        assert user_id == table.ids[int(np.argmin(np.where(rows, distance, np.inf)))]


def test_the_seed_decides_and_bad_tables_are_refused():
    profiles, _, table = grouped()
    again = find_levels(table, profiles, seed=0)
    np.testing.assert_array_equal(again.level, find_levels(table, profiles, seed=0).level)
    with pytest.raises(PSAError, match="0000100 of the table has no profile"):
        find_levels(table, profiles[:-1])
    few = EmbeddingTable(table.ids[:4], table.embeddings[:4], "test", "test")
    with pytest.raises(PSAError, match="levels need at least 5"):
        find_levels(few, profiles)
    alike = EmbeddingTable(table.ids, np.ones((100, 3), np.float32), "test", "test")
    with pytest.raises(PSAError, match="fewer than 5 distinct embeddings"):
        find_levels(alike, profiles)


def test_principal_axes_of_a_flat_cloud():
    """Points on two orthogonal directions of known spread: the axes are those directions, the larger first."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 200))
    first, second = (x - x.mean() for x in (first, second))
    second -= first * (first @ second) / (first @ first)
    points = np.zeros((200, 4), np.float32)
    points[:, 2], points[:, 0] = 9.0 * first, 2.0 * second
    np.testing.assert_allclose(principal_axes(points), np.stack([9.0 * first, 2.0 * second], axis=1), atol=1e-4)
