"""UserProfile: closed sets, both spellings, nothing sensitive in its repr."""

import re
import subprocess
import sys

import pytest

from psa_jax.errors import PSAError
from psa_jax.profiles.schema import AGE_GROUPS, UserProfile, age_group_of, check_user_id

VALID = {
    "user_id": "0000797",
    "age": 35,
    "age_group": "middle-aged",
    "gender": "male",
    "religion": "None",
    "physical_condition": "hearing impairment",
    "mental_condition": "major accidents",
}


def test_both_spellings_give_the_same_profile():
    csv_spelling = {
        "User_ID": "0000797",
        "Age": "35",
        "Age_Group": "middle-aged",
        "Gender": "male",
        "Religion": "None",
        "Physical_Condition": "hearing impairment",
        "Mental_Condition": "major accidents",
    }
    profile = UserProfile(**VALID)
    assert UserProfile.from_mapping(csv_spelling) == UserProfile.from_mapping(VALID) == profile
    assert profile.to_mapping() == {**csv_spelling, "Age": 35}
    assert list(profile.to_mapping()) == list(csv_spelling)


def test_age_and_gender_are_enough_and_the_rest_is_neutral():
    profile = UserProfile.from_json('{"age": 9, "gender": "female"}')
    assert profile == UserProfile(None, 9, "children", "female", "None", "healthy", "healthy")


@pytest.mark.parametrize(
    ("age", "group"),
    [(0, "infants & toddlers"), (3, "infants & toddlers"), (4, "children"), (12, "children"), (13, "adolescents")]
    + [(19, "adolescents"), (20, "young adults"), (34, "young adults"), (35, "middle-aged"), (59, "middle-aged")]
    + [(60, "young elderly"), (74, "young elderly"), (75, "elderly"), (89, "elderly"), (90, "long-lived elderly")]
    + [(100, "long-lived elderly")],
)
def test_age_group_boundaries(age, group):
    assert age_group_of(age) == group


def test_age_groups_cover_0_to_100_without_a_gap():
    covered = [age for low, high in AGE_GROUPS.values() for age in range(low, high + 1)]
    assert covered == list(range(101))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"age": 101}, ['"age"', "whole numbers from 0 to 100"]),
        ({"age": -1}, ['"age"']),
        ({"age": 9.5}, ['"age"']),
        ({"age": True}, ['"age"']),
        ({"age": "9.5"}, ['"age"']),
        ({"age": "٩"}, ['"age"']),
        ({"age": float("nan")}, ['"age"']),
        ({"age": None}, ['"age"']),
        ({"age": 9}, ['"age_group"', "the group that the age is in"]),
        ({"age_group": "teenagers"}, ['"age_group"', "adolescents"]),
        ({"gender": "Male"}, ['"gender"', "male, female"]),
        ({"religion": float("nan")}, ['"religion"', 'the text "None"']),
        ({"religion": None}, ['"religion"', 'the text "None"']),
        ({"religion": ""}, ['"religion"', "Christianity, Islam, Buddhism, None", 'the text "None"']),
        ({"religion": "SECRETrel" * 10_000}, ['"religion"', "Christianity, Islam, Buddhism, None"]),
        ({"physical_condition": ["SECRET"]}, ['"physical_condition"', "visual impairment"]),
        ({"mental_condition": "sad\nforged line"}, ['"mental_condition"', "sexual assault"]),
        ({"user_id": "797"}, ['"user_id"', "seven digits"]),
        ({"user_id": 797}, ['"user_id"', "seven digits"]),
        ({"user_id": "000079\n"}, ['"user_id"']),
        ({"User_ID": "0000797"}, ['"user_id" is given twice']),
        ({"SECRET": "3"}, ["key 8 of 8 is unknown", "gender"]),
        ({7: "x"}, ["key 8 of 8 is unknown"]),
    ],
)
def test_bad_values_are_refused_in_one_line_that_names_the_field_and_no_value(change, words):
    with pytest.raises(PSAError) as caught:
        UserProfile.from_mapping({**VALID, **change})
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert [word for word in words if word not in message] == []
    told = message.partition("; allowed")[0]
    values = [str(value) for value in change.values() if value != ""]
    assert [
        value for value in [*values, "SECRET", VALID["age_group"]] if re.search(rf"\b{re.escape(value)}\b", told)
    ] == []


@pytest.mark.parametrize("missing", ["age", "gender"])
def test_age_and_gender_are_required(missing):
    mapping = {"age": 9, "gender": "female"}
    del mapping[missing]
    with pytest.raises(PSAError, match=f'"{missing}" is missing'):
        UserProfile.from_mapping(mapping)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{age: 9}", "not valid JSON .*; write it like"),
        ("[9]", "expected a JSON object, found a list"),
        ('{"age": 9, "age": 30, "gender": "male"}', "given twice"),
        ('{"age": NaN, "gender": "male"}', "holds NaN"),
        ('{"age": ' + "9" * 5000 + "}", "not valid JSON .*5,000 digits"),
        ("[" * 9_000, "nested deeper"),
        ("[" * 100_000, "larger than 10,000 bytes"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(PSAError, match=message):
        UserProfile.from_json(text)


def test_the_constructor_is_as_strict_as_from_mapping():
    with pytest.raises(PSAError, match='"age" has a value that is not allowed'):
        UserProfile(**{**VALID, "age": 101})
    with pytest.raises(PSAError, match="the group that the age is in"):
        UserProfile(**{**VALID, "age_group": "children"})
    # Wrong types, in a process of its own: here the checked annotations would refuse them before the profile does.
    code = (
        "from psa_jax.errors import PSAError\nfrom psa_jax.profiles.schema import UserProfile\n"
        "for change in ({'age': '35'}, {'age': 35.0}, {'gender': float('nan')}, {'religion': None}):\n"
        f"    try: UserProfile(**{{**{VALID}, **change}})\n"
        "    except PSAError as error: print(error)\n"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition(" has a value")[0] for line in lines] == [
        f'profile: "{field}"' for field in ("age", "age", "gender", "religion")
    ]


def test_repr_shows_the_id_and_no_attribute():
    assert repr(UserProfile(**VALID)) == str(UserProfile(**VALID)) == "UserProfile(user_id='0000797')"


def test_check_user_id_returns_it():
    assert check_user_id("0000001") == "0000001"
