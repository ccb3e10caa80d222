"""The policy against the released users, the released rule, and cases worked by hand."""

import csv
import itertools
import json

import pytest

from psa_jax.errors import PSAError
from psa_jax.profiles.bans import allowed_categories, banned_categories, is_banned
from psa_jax.profiles.schema import (
    AGE_GROUPS,
    CATEGORIES,
    MENTAL_CONDITIONS,
    PHYSICAL_CONDITIONS,
    RELIGIONS,
    UserProfile,
)


def test_exact_on_every_released_user(shared_data):
    with open(shared_data / "users.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1001
    for row in rows:
        banned, allowed = row.pop("Banned_Categories"), row.pop("Allowed_Categories")
        profile = UserProfile.from_mapping(row)
        assert str(list(banned_categories(profile))) == banned
        assert str(list(allowed_categories(profile))) == allowed


def test_exact_on_every_combination_of_the_released_rule(shared_data):
    rule = json.loads((shared_data / "banned_rule.json").read_text())
    contrib = rule["contrib"]
    assert tuple(rule["categories"]) == CATEGORIES
    assert set(contrib["Age_Group"]) == set(AGE_GROUPS) and set(contrib["Religion"]) == set(RELIGIONS)
    for group, religion, physical, mental in itertools.product(
        AGE_GROUPS, RELIGIONS, PHYSICAL_CONDITIONS, MENTAL_CONDITIONS
    ):
        profile = UserProfile(None, AGE_GROUPS[group][0], group, "female", religion, physical, mental)
        expected = {
            *contrib["Age_Group"][group],
            *contrib["Religion"][religion],
            *contrib["Physical_Condition"][physical],
            *contrib["Mental_Condition"][mental],
        }
        assert banned_categories(profile) == tuple(sorted(expected))
        assert [category for category in CATEGORIES if is_banned(profile, category)] == sorted(expected)


@pytest.mark.parametrize(
    ("attributes", "banned"),
    [
        ({"age": 30}, ()),
        ({"age": 3}, ("Hate", "Self-Harm", "Sexuality", "Shocking", "Violence")),
        ({"age": 15}, ("Sexuality",)),
        ({"age": 80, "mental_condition": "anxiety"}, ("Self-Harm", "Shocking", "Violence")),
        ({"age": 30, "religion": "Islam", "physical_condition": "intellectual disability"},)
        + (("Harassment", "Propaganda", "Sexuality"),),
    ],
)
def test_hand_worked_profiles(attributes, banned):
    profile = UserProfile.from_mapping({"gender": "male", **attributes})
    assert banned_categories(profile) == banned
    assert sorted(banned + allowed_categories(profile)) == list(CATEGORIES)


def test_a_misspelt_category_is_an_error_and_not_allowed():
    profile = UserProfile.from_mapping({"age": 9, "gender": "male"})
    with pytest.raises(PSAError, match="'violence' does not exist.*Violence"):
        is_banned(profile, "violence")
