"""Measures of sets of pictures from embeddings. Whose embeddings they are is part of the measure's name.

    clip     100 · max(cos(picture, prompt), 0), the mean over pictures: CLIPScore
    cmmd     squared maximum mean discrepancy to reference pictures, times 1,000: CMMD, of unit embeddings of CLIP
    fid      Fréchet distance to reference pictures, of features of FID's Inception-v3: FID, with clean-fid's resizing
    fd_clip  the same of embeddings of CLIP: the formula of FID, not its Inception, so that its numbers are comparable
             with each other alone

A distance is biased upwards where pictures are few, FID still at thousands: compare methods with as many pictures.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg
from jaxtyping import Float, Shaped

from psa_jax.errors import PSAError
from psa_jax.evaluation.clustered import Interval
from psa_jax.evaluation.paired import resampled_limits
from psa_jax.evaluation.stats import CONFIDENCE

_SIGMA = 10.0
_SCALE = 1000.0
_MMD_DRAWS = 999


def clip_scores(pictures: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """CLIPScore of each picture and its prompt, 0 to 100.

    Args:
      pictures, texts: embeddings of length 1.

    Source: J. Hessel et al., CLIPScore (2021), with the scale 100 that is usual for pictures of a model.
    """
    return 100.0 * np.maximum(np.sum(pictures * texts, axis=-1), 0.0)


def cmmd(ours: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]) -> float:
    """CMMD: a Gaussian kernel of width 10, the diagonal included, times 1,000.

    Args:
      ours, reference: embeddings of length 1.

    Source: S. Jayasumana et al., Rethinking FID: Towards a Better Evaluation Metric for Image Generation (2024).
    """
    parts = (_kernel(ours, ours), _kernel(reference, reference), _kernel(ours, reference))
    within, of_reference, between = (float(part.mean()) for part in parts)
    return _SCALE * (within + of_reference - 2.0 * between)


def frechet_distance(ours: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two normal distributions with the sets' moments.

    Args:
      ours, reference: embeddings, at least two of each.

    Source: M. Heusel et al., GANs Trained by a Two Time-Scale Update Rule (2017), equation 6.

    Raises:
      PSAError: fewer than two pictures.
    """
    if min(len(ours), len(reference)) < 2:
        raise PSAError("a Fréchet distance needs two pictures on each side; give more")
    means = [rows.mean(axis=0) for rows in (ours, reference)]
    # Σ = RᵀR, of which (Σ₁Σ₂)^½ has the singular values of R₁R₂ᵀ: no square roots of what rounding leaves of a zero.
    first, second = (
        np.linalg.qr((rows - mean) / np.sqrt(len(rows) - 1), mode="r")
        for rows, mean in zip((ours, reference), means, strict=True)
    )
    shared = float(scipy.linalg.svdvals(first @ second.T).sum())
    return float(np.sum((means[0] - means[1]) ** 2) + np.sum(first**2) + np.sum(second**2) - 2.0 * shared)


def clustered_mean(
    values: Float[np.ndarray, " n"], clusters: Shaped[np.ndarray, " n"], confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """A mean with the percentile interval of a bootstrap over clusters.

    Args:
      values: of n cases. Differences of two methods' pictures are values, too.
      clusters: of each case, at least two of them.
      confidence: coverage.
      seed: of the resamples.

    Raises:
      PSAError: fewer than two clusters, of which nothing can be said.
    """
    names, group = _clusters(clusters)
    columns = [np.bincount(group, weights=values), np.bincount(group).astype(np.float64)]

    def mean(sums, cases, axis=-1):
        return sums.sum(axis) / cases.sum(axis)

    return float(mean(*columns)), *resampled_limits(columns, mean, confidence, seed)


def cmmd_difference(
    ours: Float[np.ndarray, "n d"],
    theirs: Float[np.ndarray, "n d"],
    reference: Float[np.ndarray, "m d"],
    clusters: Shaped[np.ndarray, " n"],
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """How much farther ours are from the reference than theirs, with the interval of a bootstrap over clusters.

    A resample draws whole clusters, and both methods' pictures of each. A picture that is drawn twice is alike to
    itself, which moves both distances by the same; it cancels in the difference. So it must not be there twice on one
    side from the start: give as many different pictures of the one method as of the other.

    Args:
      ours, theirs: embeddings of length 1 of the pictures of two methods for the same n cases, all different.
      reference: embeddings of length 1.
      clusters: of each case, at least two of them.
      confidence: coverage.
      seed: of the resamples.

    Raises:
      PSAError: fewer than two clusters, of which nothing can be said.
    """
    names, group = _clusters(clusters)
    sides = [(_kernel(rows, rows), _kernel(rows, reference).mean(axis=-1)) for rows in (ours, theirs)]

    def difference(weights: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
        whole = weights.sum(axis=-1)
        first, second = (
            np.einsum("bn,nm,bm->b", weights, within, weights, optimize=True) / whole**2
            - 2.0 * (weights @ near) / whole
            for within, near in sides
        )
        return _SCALE * (first - second)

    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1.0 / len(names)), size=_MMD_DRAWS)
    found = float(difference(np.ones((1, len(group))))[0])
    low, high = np.quantile(
        difference(drawn[:, group].astype(np.float64)), [(1 - confidence) / 2, (1 + confidence) / 2]
    )
    return found, float(low), float(high)


def _clusters(clusters: Shaped[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    names, group = np.unique(clusters, return_inverse=True)
    if len(names) < 2:
        raise PSAError("an interval needs two clusters; give pictures of more prompts")
    return names, group


def _kernel(rows: Float[np.ndarray, "n d"], columns: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    squared = np.sum(rows**2, axis=-1)[:, None] + np.sum(columns**2, axis=-1)[None] - 2.0 * rows @ columns.T
    return np.exp(-squared / (2.0 * _SIGMA**2))


Distance = Callable[[np.ndarray, np.ndarray], float]
DISTANCES: dict[str, Distance] = {"cmmd": cmmd, "fid": frechet_distance, "fd_clip": frechet_distance}
"""Name → distance of two sets of embeddings."""
