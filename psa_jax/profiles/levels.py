"""Levels L0–L5: users without bans, and five clusters of embeddings, ordered by the bans of their central user."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2

from psa_jax.errors import PSAError
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.schema import UserProfile
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.seeds import check_seed

CLUSTERS = 5
_RESTARTS = 10


@dataclass(frozen=True)
class Levels:
    """Levels of the users of a table.

    Attributes:
      ids: user ids, in the order of the table.
      level: 0 for users without bans, else 1 + the place of the user's cluster.
      cluster: 1 to 5, also of users of level 0.
      centres: the user nearest to each cluster's centre, L1 first.
    """

    ids: list[str]
    level: Int[np.ndarray, " n"]
    cluster: Int[np.ndarray, " n"]
    centres: list[str]


def find_levels(table: EmbeddingTable, profiles: Sequence[UserProfile], seed: int = 0) -> Levels:
    """Clusters a table by k-means with k = 5, the best of ten starts; orders centres by their bans, then by user id.

    Args:
      table: embeddings of n users.
      profiles: of the same users, and perhaps of others.
      seed: of the starts.

    Raises:
      PSAError: fewer users than clusters, a user of the table without a profile, or a cluster that stays empty.
    """
    bans = {profile.user_id: len(banned_categories(profile)) for profile in profiles}
    for user_id in table.ids:
        if user_id not in bans:
            raise PSAError(f"user {user_id} of the table has no profile; give the users.csv that it was made from")
    if len(table.ids) < CLUSTERS:
        raise PSAError(f"the table has {len(table.ids)} users; levels need at least {CLUSTERS}")
    points = table.embeddings.astype(np.float64)
    check_seed(seed, "levels: the seed")
    centres, labels = _k_means(points, seed)
    nearest = [int(np.argmin(np.where(labels == k, _distance(points, centres[k]), np.inf))) for k in range(CLUSTERS)]
    order = sorted(range(CLUSTERS), key=lambda k: (bans[table.ids[nearest[k]]], table.ids[nearest[k]]))
    place = np.empty(CLUSTERS, np.int64)
    place[order] = np.arange(1, CLUSTERS + 1)
    cluster = place[labels]
    free = np.array([bans[user_id] == 0 for user_id in table.ids])
    return Levels(table.ids, np.where(free, 0, cluster), cluster, [table.ids[nearest[k]] for k in order])


def principal_axes(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n 2"]:
    """The two coordinates of largest variance (PCA). The largest loading of each axis is positive."""
    centred = points.astype(np.float64) - points.mean(axis=0, dtype=np.float64)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1, keepdims=True), axis=1))
    return centred @ axes.T


def _k_means(points: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if len(np.unique(points, axis=0)) < CLUSTERS:
        raise PSAError(f"the table has fewer than {CLUSTERS} distinct embeddings; levels need more")
    best, found = np.inf, None
    for start in range(_RESTARTS):
        # A start that loses a cluster is skipped; another may keep all five.
        rng = np.random.default_rng([seed, start])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cluster, which is checked below
            centres, labels = kmeans2(points, CLUSTERS, iter=100, minit="++", rng=rng)
        spread = float(np.sum((points - centres[labels]) ** 2))
        if len(set(labels.tolist())) == CLUSTERS and spread < best:
            best, found = spread, (centres, labels)
    if found is None:
        raise PSAError(f"no start of k-means kept {CLUSTERS} clusters; give another --seed or a table of more users")
    return found


def _distance(points: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.sum((points - centre) ** 2, axis=1)
