"""What seven bits say about a user beside what the embedding says: how well each attribute can be read back."""

import numpy as np
import pytest
import torch

from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.encoders import FeatureEncoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES

FOLDS = 5


def accuracy(inputs: np.ndarray, labels: list[str]) -> float:
    """Of logistic regression, over the held-out parts."""
    values = sorted(set(labels))
    wanted = torch.tensor([values.index(label) for label in labels])
    x = torch.tensor(np.c_[inputs, np.ones(len(inputs))], dtype=torch.float32)
    order, found = np.random.default_rng(0).permutation(len(labels)), []
    for fold in range(FOLDS):
        test = order[fold::FOLDS]
        train = np.setdiff1d(order, test)
        weights = torch.zeros(x.shape[1], len(values), requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=300)

        def closure(train=train, weights=weights, optimizer=optimizer):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(x[train] @ weights, wanted[train]) + 1e-3 * (weights**2).sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        found.append(float(((x[test] @ weights).argmax(1) == wanted[test]).float().mean()))
    return float(np.mean(found))


@pytest.mark.slow
@pytest.mark.parametrize("attribute", ["religion", "mental_condition"])
def test_bits_say_less_than_the_embedding(attribute):
    users = sample_population(1000)
    labels = [getattr(user, attribute) for user in users]
    bits = np.asarray([[category in banned_categories(user) for category in CATEGORIES] for user in users], np.float32)
    guess = max(labels.count(value) for value in set(labels)) / len(labels)
    by_bits, by_embedding = accuracy(bits, labels), accuracy(FeatureEncoder().encode(users), labels)
    print(f"\n{attribute}: guessing {guess:.3f}, from seven bits {by_bits:.3f}, from the embedding {by_embedding:.3f}")
    assert guess < by_bits < by_embedding - 0.1
    assert by_embedding > 0.95
