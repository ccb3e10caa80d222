"""Differences of two methods on the same users, with intervals that count users and not pictures."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy.stats import bootstrap

from psa_jax.errors import PSAError
from psa_jax.evaluation.stats import CONFIDENCE, wilson

DRAWS = 9999
"""Resamples of a bootstrap."""


def clustered_difference(
    ours: Bool[np.ndarray, " n"],
    our_clusters: Shaped[np.ndarray, " n"],
    theirs: Bool[np.ndarray, " m"],
    their_clusters: Shaped[np.ndarray, " m"],
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The difference of two shares, ours less theirs, with the percentile interval of a bootstrap over clusters.

    A resample draws whole clusters, and both methods' cases of each: what a user's cases have in common cancels in the
    difference, and a user with many cases counts as one draw. Nothing is known of the width where there is a single
    cluster: the limits are then −1 and 1. Where no cluster differs, resamples do not either; the limits are then those
    of a share of 0 of as many cases as there are clusters (Wilson's), on both sides.

    Args:
      ours, theirs: successes, one for each case, at least one.
      our_clusters, their_clusters: the cluster of each case: numbers or names. Both methods have cases in each.
      confidence: coverage, between 0 and 1.
      seed: of the resamples.

    Returns:
      The difference, and the lower and the upper limit, in [−1, 1].

    Raises:
      PSAError: no cases, or a cluster that only one of them has.

    Source: A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application (1997), sections 3.8 and 5.2.
    """
    names, theirs_in = np.unique(our_clusters), np.unique(their_clusters)
    if not len(names) or not np.array_equal(names, theirs_in):
        raise PSAError("difference of two methods: give cases of the same users for both")
    columns = []
    for hits, clusters in ((ours, our_clusters), (theirs, their_clusters)):
        group = np.searchsorted(names, clusters)
        columns += [np.bincount(group, weights=hits), np.bincount(group).astype(np.float64)]

    def difference(our_hits, our_cases, their_hits, their_cases, axis=-1):
        return our_hits.sum(axis) / our_cases.sum(axis) - their_hits.sum(axis) / their_cases.sum(axis)

    found = float(difference(*columns))
    if len(names) == 1:
        return found, -1.0, 1.0
    if np.array_equal(columns[0] * columns[3], columns[2] * columns[1]):
        limit = wilson(0, len(names), confidence)[1]
        return found, -limit, limit
    return found, *resampled_limits(columns, difference, confidence, seed)


def resampled_limits(
    columns: Sequence[Float[np.ndarray, " g"]],
    statistic: Callable[..., np.ndarray],
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """The limits of a percentile bootstrap over clusters.

    Args:
      columns: sums of each of g clusters, at least two; a resample draws clusters, the same of every column.
      statistic: of the columns, along `axis`.
      confidence: coverage, between 0 and 1.
      seed: of the resamples.
    """
    limits = bootstrap(
        columns,
        statistic,
        n_resamples=DRAWS,
        batch=256,  # bounds memory where clusters are many
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(limits.low), float(limits.high)
