"""The features encoder against rows written by hand and against itself."""

import numpy as np
import pytest

from psa_jax.errors import PSAError
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.encoder_registry import ENCODERS
from psa_jax.profiles.encoders import Encoder, FeatureEncoder, get_encoder, load_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES, UserProfile


def test_a_row_written_by_hand():
    profile = UserProfile.from_mapping({"age": 15, "gender": "female", "religion": "Islam"})
    expected = (
        [0.15]
        + [0, 0, 1, 0, 0, 0, 0, 0]  # adolescents
        + [0, 1]  # female
        + [0, 1, 0, 0]  # Islam
        + [1, 0, 0, 0]  # healthy
        + [1, 0, 0, 0, 0, 0, 0]  # healthy
        + [0, 0, 1, 0, 1, 0, 0]  # bans Propaganda and Sexuality
    )
    u = get_encoder("features").encode([profile])
    assert u.dtype == np.float32
    np.testing.assert_array_equal(u, np.asarray([expected], np.float32))


@pytest.mark.parametrize(("name", "dim"), [("features", 33), ("features-no-bans", 26)])
def test_every_encoder_of_the_table_keeps_its_word(name, dim):
    encoder = get_encoder(name)
    users = sample_population(50)
    u = encoder.encode(users)
    assert isinstance(encoder, Encoder) and encoder.name == name and encoder.dim == dim
    assert u.shape == (50, dim) and u.min() >= 0 and u.max() <= 1
    np.testing.assert_array_equal(encoder.encode(users[7:8]), u[7:8])  # a row does not depend on its batch
    assert encoder.encode([]).shape == (0, dim)


def test_own_bans_have_bits_or_are_refused():
    usual, own = (UserProfile.from_mapping({"age": 30, "gender": "male", "bans": bans}) for bans in ([], ["Hate"]))
    encoder = get_encoder("features")
    first, second = encoder.encode([usual, own])
    assert [encoder.fields[place] for place in (first != second).nonzero()[0]] == ["bans=Hate"]
    with pytest.raises(PSAError, match="no place for a profile's own bans"):
        get_encoder("features-no-bans").encode([usual, own])


def test_columns_are_the_named_fields():
    encoder = FeatureEncoder()
    users = sample_population(100)
    u = dict(zip(encoder.fields, encoder.encode(users).T, strict=True))
    assert [user.age for user in users] == np.rint(u["age/100"] * 100).tolist()
    for category in CATEGORIES:
        assert u[f"bans={category}"].astype(bool).tolist() == [category in banned_categories(user) for user in users]
    one_hot = [column for field, column in u.items() if "=" in field and not field.startswith("bans=")]
    np.testing.assert_array_equal(np.sum(one_hot, axis=0), np.full(100, 5.0))  # one a field


def test_without_bans_the_rest_is_the_same():
    users = sample_population(20)
    np.testing.assert_array_equal(
        FeatureEncoder(ban_bits=False).encode(users), FeatureEncoder().encode(users)[:, : -len(CATEGORIES)]
    )


def test_fingerprints_tell_encoders_apart_and_do_not_move():
    fingerprints = {name: get_encoder(name).fingerprint for name, entry in ENCODERS.items() if entry.model is None}
    assert len(set(fingerprints.values())) == len(fingerprints) == 2
    # Tables and adapters on disk hold this text: if it moves, raise VERSION and say so in the changelog.
    assert fingerprints["features"] == "features-v1-a49e998a152943f7"


def test_an_unknown_encoder_is_refused():
    with pytest.raises(PSAError, match="'quen' does not exist; use one of: features"):
        get_encoder("quen")


def test_an_encoder_with_a_model_says_what_it_needs():
    with pytest.raises(PSAError, match="'qwen' needs its language model.*--encoder=qwen --model=DIR.*--user ID"):
        get_encoder("qwen")
    with pytest.raises(PSAError, match="--encoder=qwen needs --model DIR, a Qwen2.5 folder"):
        load_encoder("qwen", None)
    assert load_encoder("features", None) == FeatureEncoder()
