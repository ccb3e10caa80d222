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


def test_bans_of_ones_own_are_added_and_take_nothing_away():
    adult = UserProfile.from_mapping({"age": 30, "gender": "male", "bans": ["Violence", "Hate"]})
    assert banned_categories(adult) == ("Hate", "Violence") == adult.bans
    assert is_banned(adult, "Hate") and not is_banned(adult, "Shocking")
    child = UserProfile.from_mapping({"age": 9, "gender": "male", "Own_Bans": ["Propaganda"]})
    assert banned_categories(child) == ("Hate", "Propaganda", "Self-Harm", "Sexuality", "Shocking", "Violence")
    assert banned_categories(UserProfile.from_mapping({"age": 9, "gender": "male", "bans": []})) == tuple(
        name for name in banned_categories(child) if name != "Propaganda"
    )
    assert UserProfile.from_mapping(adult.to_mapping()) == adult and "Hate" not in repr(adult)


@pytest.mark.parametrize("bans", ["Hate", ["hate"], ["Hate", "Hate"], [3], {"Hate": 1}, None, ["Spiders"]])
def test_what_is_no_list_of_categories_is_refused_without_its_value(bans):
    with pytest.raises(PSAError, match='"bans" has a value that is not allowed; allowed: a list') as error:
        UserProfile.from_mapping({"age": 30, "gender": "male", "bans": bans})
    assert "Spiders" not in str(error.value)
    with pytest.raises(PSAError, match='"bans" is given twice'):
        UserProfile.from_mapping({"age": 30, "gender": "male", "bans": ["Hate"], "Own_Bans": ["Hate"]})
