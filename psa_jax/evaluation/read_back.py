"""What numbers about a user give away: how often an attribute of the profile is read back from them."""

import importlib.util
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from psa_jax.errors import PSAError
from psa_jax.evaluation.clustered import Interval
from psa_jax.evaluation.stats import wilson

FOLDS = 5
ATTACKERS = {"linear": "logistic regression", "forest": "a random forest"}
"""Name → what reads: the first only what a column says by itself, the second what columns say together."""
_TREES = 100


def require_classifier(command: str) -> None:
    """Raises PSAError where scikit-learn is missing, before any work; `command` is what asks for it."""
    if importlib.util.find_spec("sklearn") is None:
        raise PSAError(f"{command} reads attributes back with scikit-learn: pip install 'psa_jax[eval]'")


def read_back(inputs: Shaped[np.ndarray, "n d"], values: Sequence[str], seed: int = 0, by: str = "linear") -> Interval:
    """Share of users whose value of an attribute is read right, in percent with its interval.

    Each fifth of the users is read by a model of the other four. Columns are standardised, so that small differences
    count as much as large ones.

    Args:
      inputs: numbers of n users, as an attacker has them.
      values: the attribute of each.
      seed: of the split into fifths, and of the forest.
      by: one of ATTACKERS.

    Returns:
      The share with Wilson's interval: each user counts once.

    Raises:
      PSAError: a value that fewer than FOLDS users have.
    """
    from sklearn.ensemble import RandomForestClassifier  # imported late: of the `eval` extra
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rarest = min(values.count(value) for value in set(values)) if values else 0
    if rarest < FOLDS:
        raise PSAError(f"an attribute has a value of {rarest} users; give at least {FOLDS} users of each value")
    readers = {
        "linear": LogisticRegression(max_iter=5000),
        "forest": RandomForestClassifier(_TREES, random_state=seed),
    }
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    read = cross_val_predict(make_pipeline(StandardScaler(), readers[by]), inputs, np.asarray(values), cv=folds)
    return _share(int((read == np.asarray(values)).sum()), len(values))


def guessed(values: Sequence[str]) -> Interval:
    """Share of users with the most frequent value, which needs no numbers, in percent with its interval."""
    return _share(max(values.count(value) for value in set(values)), len(values))


def _share(hits: int, n: int) -> Interval:
    low, high = wilson(hits, n)
    return 100.0 * hits / n, 100.0 * low, 100.0 * high
