"""Measures from embeddings, against closed forms and torch code of another shape."""

import numpy as np
import pytest
import torch

from psa_jax.errors import PSAError
from psa_jax.evaluation.measures import clip_scores, clustered_mean, cmmd, cmmd_difference, frechet_distance


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def sets(count: int = 40, width: int = 12):
    random = np.random.default_rng(0)
    mixed = random.normal(size=(width, width))
    return random.normal(size=(count, width)) @ mixed + 1.0, random.normal(size=(count + 7, width))


def test_frechet_distance_of_torch():
    """With the eigenvalues of the product itself, which are complex but for rounding."""
    ours, reference = sets()
    a, b = torch.from_numpy(ours), torch.from_numpy(reference)
    first, second = torch.cov(a.T), torch.cov(b.T)
    shared = torch.linalg.eigvals(first @ second).sqrt().sum().real
    wanted = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * shared
    assert frechet_distance(ours, reference) == pytest.approx(float(wanted), rel=1e-6)


def test_frechet_distance_by_hand():
    """Axis by axis: (μ₁ − μ₂)² + (σ₁ − σ₂)². Four corners have a variance of 4/3 of their squared coordinates."""
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float64)
    ours, reference = corners * [3.0, 1.0] + [1.0, 0.0], corners * [1.0, 2.0]
    assert frechet_distance(ours, reference) == pytest.approx(1.0 + 4 / 3 * ((3 - 1) ** 2 + (1 - 2) ** 2))
    assert frechet_distance(ours, ours) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_fewer_pictures_than_numbers():
    """Their covariance has no inverse; the formula needs none."""
    ours, reference = sets(count=5, width=30)
    assert np.isfinite(frechet_distance(ours, reference)) and frechet_distance(ours, reference) > 0
    with pytest.raises(PSAError, match="needs two pictures on each side"):
        frechet_distance(ours[:1], reference)


def test_cmmd_of_torch():
    """Pair by pair, as the definition says it."""
    ours, reference = (unit(rows) for rows in sets())

    def mean(a, b):
        distances = torch.cdist(torch.from_numpy(a), torch.from_numpy(b), compute_mode="donot_use_mm_for_euclid_dist")
        return torch.exp(-distances.square() / (2 * 10.0**2)).mean()

    wanted = 1000 * (mean(ours, ours) + mean(reference, reference) - 2 * mean(ours, reference))
    assert cmmd(ours, reference) == pytest.approx(float(wanted), rel=1e-6)
    assert cmmd(ours, ours) == pytest.approx(0.0, abs=1e-9)


def test_cmmd_of_two_opposite_pictures():
    """‖x − y‖² is 4 and 0: 1000 · 2 (1 − exp(−4 / 200))."""
    assert cmmd(np.array([[1.0, 0.0]]), np.array([[-1.0, 0.0]])) == pytest.approx(2000 * (1 - np.exp(-0.02)))


def test_clip_scores():
    pictures, texts = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    assert clip_scores(pictures, texts).tolist() == pytest.approx([100.0, 60.0, 0.0])


def test_a_mean_of_clusters():
    random = np.random.default_rng(2)
    values, names = random.normal(size=300), np.arange(300)
    found, low, high = clustered_mean(values, names)
    half = 1.96 * values.std() / np.sqrt(300)
    assert (found, low, high) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=0.01)
    np.testing.assert_allclose(
        clustered_mean(values.repeat(5), names.repeat(5)), (found, low, high), atol=1e-12
    )  # five times the same says no more


def test_one_cluster_has_no_interval():
    rows = unit(np.random.default_rng(0).normal(size=(4, 3)))
    for ask in (lambda one: clustered_mean(np.ones(4), one), lambda one: cmmd_difference(rows, rows, rows, one)):
        with pytest.raises(PSAError, match="needs two clusters; give pictures of more prompts"):
            ask(np.zeros(4, int))


def test_the_difference_of_two_distances():
    """It is that of the distances, and its interval holds 0 where the two sets are of one kind, and not where they
    are not."""
    random = np.random.default_rng(3)
    reference, same, other = (unit(random.normal(size=(60, 6)) + shift) for shift in (0.0, 0.0, 0.0))
    far, prompts = unit(random.normal(size=(60, 6)) + 1.5), np.arange(60) // 2
    found = cmmd_difference(far, same, reference, prompts)
    assert found[0] == pytest.approx(cmmd(far, reference) - cmmd(same, reference))
    assert found[1] > 0 and found[1] < found[0] < found[2]
    _, low, high = cmmd_difference(other, same, reference, prompts)
    assert low < 0 < high
    assert cmmd_difference(same, same, reference, prompts) == (0.0, 0.0, 0.0)
