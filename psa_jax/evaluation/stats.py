"""Confidence intervals for rates of few cases."""

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

from psa_jax.errors import PSAError

CONFIDENCE = 0.95


def wilson(successes: int | float, n: int | float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a share: (p̂ + z²/2n ± z √(p̂(1−p̂)/n + z²/4n²)) / (1 + z²/n).

    Unlike p̂ ± z·se it stays inside [0, 1], and it has a width above 0 at 0 of n and n of n.

    Args:
      successes: number of successes; a fraction where cases count for less than one each.
      n: number of cases, more than 0.
      confidence: coverage, between 0 and 1.

    Returns:
      Lower and upper limit, shares in [0, 1].

    Raises:
      PSAError: no cases, or more successes than cases.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not 0 <= successes <= n or n <= 0:
        raise PSAError(f"interval of {successes} successes in {n} cases: give n > 0 and 0 <= successes <= n")
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    # At 0 of n and n of n the limits are exactly 0 and 1, which rounding would miss.
    return (centre - half) / scale if successes else 0.0, (centre + half) / scale if successes < n else 1.0


def selectivity_interval(
    suppressed: int, banned: int, retained: int, allowed: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Interval of s + r − 1, with s = suppressed / banned and r = retained / allowed, by Newcombe's hybrid score.

    The squared distances from s and r to their Wilson limits add up, since the two shares come from different cases.

    Args:
      suppressed: number of banned prompts whose picture lacks the content.
      banned: number of banned prompts, at least 1.
      retained: number of allowed prompts whose picture shows the content.
      allowed: number of allowed prompts, at least 1.
      confidence: coverage, between 0 and 1.

    Returns:
      Lower and upper limit, in [−1, 1].

    Source: R. G. Newcombe, Interval estimation for the difference between independent proportions, method 10,
    Statistics in Medicine 17 (1998); a sum is the difference from the complement.
    """
    shares = suppressed / banned, retained / allowed
    limits = wilson(suppressed, banned, confidence), wilson(retained, allowed, confidence)
    return sum_of_shares(*((share, *pair) for share, pair in zip(shares, limits, strict=True)))


def sum_of_shares(*shares: tuple[float, float, float]) -> tuple[float, float]:
    """Interval of s + r − 1: the squared distances from the shares to their own limits add up.

    Args:
      shares: s and r, each with its lower and upper limit.

    Returns:
      Lower and upper limit.
    """
    value = sum(share for share, _, _ in shares) - 1
    below = math.hypot(*(share - low for share, low, _ in shares))
    above = math.hypot(*(high - share for share, _, high in shares))
    return value - below, value + above


def mean_interval(values: Sequence[int | float], confidence: float = CONFIDENCE) -> tuple[float, float | None]:
    """Mean of n draws of a normal distribution, and half the width of its interval: t_{n−1} · s / √n.

    Args:
      values: at least one, such as a metric of trainings that differ in their seed.
      confidence: coverage, between 0 and 1.

    Returns:
      The mean, and the half width; None for one value, which says nothing about others.

    Raises:
      PSAError: no value.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    if not values:
        raise PSAError("interval of no values: give at least one")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    t = float(stdtrit(len(values) - 1, 0.5 + confidence / 2))
    return mean, t * statistics.stdev(values, mean) / math.sqrt(len(values))
