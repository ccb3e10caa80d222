"""A profile at serving time: the embedding that its encoder gives, in batches of different users, and refusals."""

import inspect

import numpy as np
import pytest
from support.torch_runtime import IDS, difference, draw

from psa_jax.errors import PSAError
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import UserProfile
from psa_jax.torch import load_psa
from psa_jax.torch.users import embeddings_of, profiles_encoded

# diffusers gives torch tensors to numpy in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CHILD = {"age": 9, "gender": "female"}


@pytest.fixture
def psa(pipe, files, table):
    return load_psa(pipe, files["text"], table=table)


def test_profiles_draw_what_their_embeddings_draw(psa):
    people = {user.user_id: user for user in sample_population(8)}
    profiles = [people[user].to_mapping() for user in IDS]
    by_id = draw(psa, user=IDS)
    assert difference(draw(psa, profile=profiles), by_id) == 0
    assert difference(draw(psa, profile=[people[user] for user in IDS]), by_id) == 0
    embedding = get_encoder("features").encode([UserProfile.from_mapping(CHILD)])
    assert difference(draw(psa, profile=CHILD), draw(psa, user=embedding)) == 0
    assert difference(draw(psa, profile=CHILD), by_id) > 0.001


def test_it_needs_no_table(pipe, files):
    psa = load_psa(pipe, files["text"])
    assert np.isfinite(draw(psa, profile=CHILD)).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"profile": CHILD, "user": IDS}, r"give either user=\.\.\. or profile=\.\.\., not both"),
        ({"profile": {"age": 98765, "gender": "female"}}, "age"),
        ({"profile": {"age": 9}}, "gender"),
        ({"profile": []}, "profile is an empty list"),
        ({"profile": [CHILD] * 3}, "3 users for 2 prompts"),
    ],
)
def test_bad_users_draw_nothing(psa, call, says):
    with pytest.raises(PSAError, match=says) as caught:
        draw(psa, **call)
    assert "98765" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("user", [1, CHILD, {"0000001"}, [1]])
def test_what_is_no_user_is_one_line(psa, user):
    """Without the checks of annotations that tests have."""
    with pytest.raises(PSAError, match="user must be a list of ids, or embeddings as one array or tensor"):
        inspect.unwrap(embeddings_of)(user, psa.adapter.config, psa.table)
    with pytest.raises(PSAError, match="profile: expected key-value pairs, got int"):
        inspect.unwrap(profiles_encoded)(1, "a.safetensors", {}, None)
