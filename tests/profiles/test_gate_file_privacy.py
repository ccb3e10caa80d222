"""What seven bits say about a user beside what the embedding says: how well each attribute can be read back."""

import numpy as np
import pytest

from psa_jax.evaluation.read_back import guessed, read_back
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.encoders import FeatureEncoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES


@pytest.mark.parametrize("attribute", ["religion", "mental_condition"])
def test_bits_say_less_than_the_embedding(attribute):
    users = sample_population(1000)
    labels = [getattr(user, attribute) for user in users]
    bits = np.asarray([[category in banned_categories(user) for category in CATEGORIES] for user in users], np.float32)
    guess, by_bits = guessed(labels)[0], read_back(bits, labels)[0]
    by_embedding = read_back(FeatureEncoder().encode(users), labels)[0]
    assert guess < by_bits < by_embedding - 10
    assert by_embedding > 95
