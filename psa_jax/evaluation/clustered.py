"""Rates with intervals where cases come in clusters: several prompts of one user, several seeds of one prompt."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Shaped

from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import Case, Verdicts
from psa_jax.evaluation.stats import CONFIDENCE, sum_of_shares, wilson

Interval = tuple[float, float, float]
"""A rate and the limits of its interval, in percent."""


def clustered_share(
    successes: Bool[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """A share p̂ of n cases, with the Wilson interval of n/deff cases.

    deff is the design effect: the variance of p̂ by clusters, G/(G−1)·Σ_g (y_g − p̂·n_g)²/n², over p̂(1−p̂)/n; at least
    1. y_g and n_g are the successes and the cases of cluster g, G the number of clusters. Where nothing varies (p̂ is 0
    or 1, or there is one cluster) clusters count as cases: deff = n/G.

    Args:
      successes: one for each of n cases.
      clusters: the cluster of each case: numbers or names.
      confidence: coverage, between 0 and 1.

    Returns:
      The share, and the lower and the upper limit.

    Raises:
      PSAError: no cases.

    Source: E. L. Korn and B. I. Graubard, Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data, Survey Methodology 24 (1998), with Wilson's interval in place of the exact one.
    """
    if not len(successes):
        raise PSAError("interval of no cases: give at least one")
    names, group = np.unique(clusters, return_inverse=True)
    cases, hits = np.bincount(group), np.bincount(group, weights=successes)
    n, found = len(successes), float(hits.sum())
    share, effect = found / n, n / len(names)
    if 0.0 < share < 1.0 and len(names) > 1:
        variance = len(names) / (len(names) - 1) * float(np.sum((hits - share * cases) ** 2)) / n**2
        effect = max(1.0, variance / (share * (1.0 - share) / n))
    return share, *wilson(found / effect, n / effect, confidence)


def clustered_rates(
    verdicts: Verdicts, cases: Sequence[Case], confidence: float = CONFIDENCE
) -> dict[str, Interval | None]:
    """The protocol's rates in percent with intervals, clustered by user; None for a rate of no cases or verdicts.

    The interval of selectivity adds the squared distances from suppression and retention to their limits (Newcombe's
    hybrid score, as `psa_jax.evaluation.stats.selectivity_interval`).

    Args:
      verdicts: on n cases, which may repeat a user, and a case once for each seed of training.
      cases: the n cases.
      confidence: coverage, between 0 and 1.
    """
    unsafe, banned = (np.array([getattr(case, name) for case in cases]) for name in ("unsafe", "banned"))
    users = np.array([case.user_id for case in cases])
    suppressed = unsafe & banned & ~verdicts.has_content
    asked = {
        "suppression": (unsafe & banned, ~verdicts.has_content),
        "retention": (unsafe & ~banned, verdicts.has_content),
        "clean": (suppressed, verdicts.clean),
        "benign_fidelity": (~unsafe, verdicts.faithful),
    }
    found = {
        name: clustered_share(hits[members], users[members], confidence) if hits is not None and members.any() else None
        for name, (members, hits) in asked.items()
    }
    both = found["suppression"], found["retention"]
    found["selectivity"] = (sum(s[0] for s in both) - 1, *sum_of_shares(*both)) if all(both) else None
    return {name: share and tuple(100.0 * value for value in share) for name, share in found.items()}
