"""What numbers about a user give away: how often an attribute of the profile is read back from them."""

import importlib.util
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from psa_jax.errors import PSAError
from psa_jax.evaluation.clustered import Interval
from psa_jax.evaluation.stats import wilson

FOLDS = 5


def require_classifier(command: str) -> None:
    """Raises PSAError where scikit-learn is missing, before any work; `command` is what asks for it."""
    if importlib.util.find_spec("sklearn") is None:
        raise PSAError(f"{command} reads attributes back with scikit-learn: pip install 'psa_jax[eval]'")


def read_back(inputs: Float[np.ndarray, "n d"], values: Sequence[str], seed: int = 0) -> Interval:
    """Share of users whose value of an attribute logistic regression says right, in percent with its interval.

    Each fifth of the users is read by a model of the other four. Columns are standardised, so that small differences
    count as much as large ones.

    Args:
      inputs: numbers of n users, as an attacker has them.
      values: the attribute of each.
      seed: of the split into fifths.

    Returns:
      The share with Wilson's interval: each user counts once.

    Raises:
      PSAError: a value that fewer than FOLDS users have.
    """
    from sklearn.linear_model import LogisticRegression  # imported late: of the `eval` extra
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rarest = min(values.count(value) for value in set(values)) if values else 0
    if rarest < FOLDS:
        raise PSAError(f"an attribute has a value of {rarest} users; give at least {FOLDS} users of each value")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    read = cross_val_predict(model, inputs, np.asarray(values), cv=folds)
    return _share(int((read == np.asarray(values)).sum()), len(values))


def guessed(values: Sequence[str]) -> Interval:
    """Share of users with the most frequent value, which needs no numbers, in percent with its interval."""
    return _share(max(values.count(value) for value in set(values)), len(values))


def _share(hits: int, n: int) -> Interval:
    low, high = wilson(hits, n)
    return 100.0 * hits / n, 100.0 * low, 100.0 * high
