"""Requests of the page, read strictly."""

import json

import pytest

from psa_jax.playground.asked import MOST_BYTES, MOST_PROMPT, MOST_USERS, Refused, read_asked
from psa_jax.profiles.schema import ATTRIBUTES, UserProfile

FULL = {
    "age": "100",
    "gender": "female",
    "religion": "Christianity",
    "physical_condition": "intellectual disability",
    "mental_condition": "natural disasters",
}
ASKED = {"prompt": " a cat ", "users": [FULL], "seed": 3, "steps": 20, "guidance": 7.5, "scale": 0.5}


def read(changed: dict, allow_unprotected: bool = False):
    return read_asked(json.dumps(ASKED | changed).encode(), allow_unprotected)


def test_a_request_is_read():
    found = read({"seed": str(2**64 - 1), "guidance": 0, "scale": 1})
    assert found.prompt == " a cat " and found.seed == 2**64 - 1 and found.base is False
    assert (found.steps, found.guidance, found.scale) == (20, 0.0, 1.0) and type(found.guidance) is float
    assert found.users == (UserProfile.from_mapping(FULL),)
    assert read({"users": [FULL | {"bans": ["Hate"]}]}).users[0].bans == ("Hate",)
    assert "female" not in repr(found) and "100" not in repr(found)
    assert read({"base": True, "scale": 0}, allow_unprotected=True).base is True


def test_the_longest_request_fits():
    body = json.dumps(ASKED | {"prompt": "\u20ac" * MOST_PROMPT, "users": [FULL] * MOST_USERS, "seed": str(2**64 - 1)})
    assert len(body) < MOST_BYTES
    assert len(read_asked(body.encode(), False).users) == MOST_USERS


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"seed": 2**64}, "seed"),
        ({"seed": str(2**64)}, "seed"),
        ({"seed": "1e3"}, "seed"),
        ({"seed": ""}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": "٣"}, "seed"),
        ({"steps": 2.0}, "steps"),
        ({"steps": None}, "steps"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": 51}, "guidance"),
        ({"scale": 0.01}, "scale"),
        ({"scale": -0.0}, "scale"),
        ({"scale": 1.01}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"scale": [1]}, "scale"),
        ({"base": 1}, "base"),
        ({"prompt": 3}, "prompt"),
        ({"users": {}}, "users"),
        ({"users": [FULL] * 5}, "users"),
        ({"users": [FULL, "x"]}, "users.1"),
        ({"users": [FULL | {"nick": "x"}]}, "users.0"),
        *(({"users": [FULL | {name: "secret"}]}, f"users.0.{name}") for name in ("age", "bans", *ATTRIBUTES)),
        ({"users": [FULL | {"bans": ["secret"]}]}, "users.0.bans"),
    ],
)
def test_what_is_refused_names_its_control_and_no_value(changed, where):
    with pytest.raises(Refused) as caught:
        read(changed)
    assert caught.value.where == where and caught.value.status == 400
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
