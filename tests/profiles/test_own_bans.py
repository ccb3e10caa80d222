"""Bans of one's own: an adapter that is not sure to act on them is refused, by the numbers of its own gate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.torch_adapters import random_adapter

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import read_metadata
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import FeatureEncoder
from psa_jax.profiles.own_bans import _gate_says, ban_columns
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.profiles.table import OWN_BANS_NOTE, EmbeddingTable
from psa_jax.profiles.user_embedding import user_embedding

ENCODER = FeatureEncoder()
ABOUT = {"encoder": ENCODER.name, "encoder_fingerprint": ENCODER.fingerprint, "standardised": False}
READABLE = AdapterConfig("edit", 0, ENCODER.dim, 20, ((16, 2),), gate="categories")
OTHER = AdapterConfig("text", 2, ENCODER.dim, 20, ((16, 2),))
USERS = sample_population(12)
OWN = [dataclasses.replace(user, bans=("Hate", "Violence")) if index == 5 else user for index, user in enumerate(USERS)]


@pytest.fixture
def saved(tmp_path):
    """Writes an adapter; with `sure` its gate says of all users that they ban everything, or nothing."""

    def save(config: AdapterConfig, sure: float = 0.0, **about):
        adapter = random_adapter(config)
        if sure:
            adapter.gate.user.second_bias[...] = jnp.full(len(CATEGORIES), sure)
        path = tmp_path / "a.safetensors"
        path.unlink(missing_ok=True)
        save_adapter(adapter, path, ABOUT | about)
        return adapter, path

    return save


def embedding_of(path, **given):
    given = {"profile": None, "user": None, "table": None} | given
    return user_embedding(path, read_metadata(path), **given)


def test_the_gate_is_asked_as_the_adapter_computes_it(saved):
    adapter, path = saved(READABLE)
    users = ENCODER.encode(sample_population(60))
    wanted = np.asarray(jax.nn.sigmoid(adapter.gate.ban_logits(jnp.asarray(users)))) > 0.5
    assert 0.1 < wanted.mean() < 0.9
    np.testing.assert_array_equal(_gate_says(path, users), wanted)


def test_a_profile_is_taken_where_the_gate_says_its_bans(saved):
    _, path = saved(READABLE, sure=50.0)
    np.testing.assert_array_equal(embedding_of(path, profile=OWN[5]), ENCODER.encode([OWN[5]]))
    _, path = saved(READABLE, sure=-50.0)
    with pytest.raises(PSAError, match="not sure to act on the bans that the profile states; train one with") as error:
        embedding_of(path, profile=OWN[5])
    assert not any(category in str(error.value) for category in CATEGORIES)
    embedding_of(path, profile=USERS[5])  # one without bans of its own is as before


def test_an_adapter_that_cannot_be_asked_is_refused(saved):
    _, path = saved(OTHER)
    with pytest.raises(PSAError, match="not sure to act"):
        embedding_of(path, profile=OWN[5])
    embedding_of(path, profile=USERS[5])


@pytest.mark.parametrize("scale", [False, True], ids=["raw", "standardised"])
def test_a_table_knows_that_users_state_bans(saved, scale):
    plain, own = (EmbeddingTable.from_profiles(users, ENCODER) for users in (USERS, OWN))
    assert OWN_BANS_NOTE in own.notes and OWN_BANS_NOTE not in plain.notes
    newcomer = EmbeddingTable.from_profiles([dataclasses.replace(OWN[5], user_id="0000099")], ENCODER)
    joined = plain.joined(newcomer)
    assert OWN_BANS_NOTE in joined.notes
    if scale:
        plain, own = plain.standardised(), own.standardised()
    _, path = saved(READABLE, sure=-90.0, standardised=scale)
    embedding_of(path, user=USERS[0].user_id, table=plain)
    with pytest.raises(PSAError, match="bans that users of the table state"):
        embedding_of(path, user=USERS[0].user_id, table=own)
    _, path = saved(READABLE, sure=90.0, standardised=scale)
    embedding_of(path, user=USERS[0].user_id, table=own)
    _, path = saved(OTHER, standardised=scale)
    with pytest.raises(PSAError, match="bans that users of the table state"):
        embedding_of(path, user=USERS[0].user_id, table=own)
    _, path = saved(OTHER, standardised=scale, own_bans=True)  # trained on such a table
    embedding_of(path, user=USERS[0].user_id, table=own)


def test_the_columns_are_those_of_the_bans():
    table = EmbeddingTable.from_profiles(OWN, ENCODER)
    assert table.embeddings[5, ban_columns(table)].tolist() == [
        float(category in ("Hate", "Violence") or ENCODER.encode([USERS[5]])[0, column] == 1.0)
        for category, column in zip(CATEGORIES, ban_columns(table), strict=True)
    ]
    other = EmbeddingTable.from_profiles(USERS, FeatureEncoder(ban_bits=False))
    assert ban_columns(other) is None
