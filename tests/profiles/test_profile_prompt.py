"""The profile prompt and the replies to the question about bans, against texts and answers written by hand."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_jax.errors import PSAError
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.population import sample_population, write_users_csv
from psa_jax.profiles.profile_prompt import (
    FIELDS,
    PROFILE,
    QUESTION,
    Answer,
    Template,
    count_answers,
    decide,
    parse_categories,
    read_template,
)
from psa_jax.profiles.schema import CATEGORIES, UserProfile

ADULT = UserProfile.from_mapping({"age": 35, "gender": "male", "religion": "Islam", "mental_condition": "war"})
CHILD = UserProfile.from_mapping({"age": 9, "gender": "female", "physical_condition": "visual impairment"})
TEEN = UserProfile.from_mapping({"age": 19, "gender": "female", "religion": "Buddhism"})
MINOR_BANS = ("Hate", "Self-Harm", "Sexuality", "Shocking", "Violence")


def test_every_field_filled_by_hand():
    text = "".join(f"{field}: <<{field}>>\n" for field in FIELDS) + "<<AGE>> again, < <<AGE> stays"
    assert Template(text).render(ADULT, ("Violence", "Hate")) == (
        "AGE: 35\nAGE_GROUP: middle-aged\nGENDER: male\nRELIGION: Islam\nPHYSICAL: healthy\nMENTAL: war\n"
        "BANNED: ['Hate', 'Violence']\n"
        "ALLOWED: ['Harassment', 'Propaganda', 'Self-Harm', 'Sexuality', 'Shocking']\n35 again, < <<AGE> stays"
    )


def test_what_was_filled_in_is_not_filled_again():
    assert Template("<<<<GENDER>>>>").render(ADULT, ()) == "<<male>>"
    # A pass for each field, as by `replace`, would find a field in what this one leaves behind.
    assert Template("<<A<<GENDER>>GE>>").render(ADULT, ()) == "<<AmaleGE>>"


def test_lists_read_as_in_users_csv(tmp_path):
    users = sample_population(200)
    write_users_csv(tmp_path / "users.csv", users)
    rows = csv.DictReader(io.StringIO((tmp_path / "users.csv").read_text()))
    template = Template("<<BANNED>>;<<ALLOWED>>")
    for user, row in zip(users, rows, strict=True):
        expected = f"{row['Banned_Categories']};{row['Allowed_Categories']}"
        assert template.render(user, banned_categories(user)) == expected


def test_the_projects_texts_tell_profiles_apart():
    users = sample_population(1000)
    for template in (PROFILE, QUESTION):
        texts = [template.render(user, banned_categories(user)) for user in users]
        attributes = {tuple(user.to_mapping().values())[1:] for user in users}
        assert len(set(texts)) == len(attributes) > 700
        assert not any("<<" in text or "0000" in text for text in texts)  # no field left, no id given away
    assert "BANNED" in PROFILE.text and "BANNED" not in QUESTION.text
    assert all(category in QUESTION.text for category in CATEGORIES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no field", "no field in it"),
        ("<<AGE>> <<NAME>>", "field <<NAME>> does not exist; use of: AGE"),
        ("<<age>>", "field <<age>> does not exist"),
        ("<< AGE >>", "field << AGE >> does not exist"),
        ("<<>>", "field <<>> does not exist"),
    ],
)
def test_a_bad_template_is_refused(text, message, tmp_path):
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(PSAError, match=message) as caught:
        read_template(tmp_path / "prompt.txt")
    assert str(caught.value).startswith(str(tmp_path / "prompt.txt")) and "\n" not in str(caught.value)


def test_reading_a_template(tmp_path):
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfAge:\r\n<<AGE>>\r\n")
    (tmp_path / "unix.txt").write_bytes(b"Age:\n<<AGE>>\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe<<AGE>>")
    windows, unix = (read_template(tmp_path / name) for name in ("windows.txt", "unix.txt"))
    assert windows.text == unix.text == "Age:\n<<AGE>>\n" and windows.hash == unix.hash
    assert windows.hash != PROFILE.hash and len(windows.hash) == 16
    with pytest.raises(PSAError, match="binary.txt: not UTF-8"):
        read_template(tmp_path / "binary.txt")
    with pytest.raises(PSAError, match=r"none.txt: cannot be read"):
        read_template(tmp_path / "none.txt")


def test_the_projects_texts_do_not_move():
    # Tables and adapters on disk depend on them: if one moves, raise QwenEncoder.VERSION and say so in the changelog.
    assert (PROFILE.hash, QUESTION.hash) == ("aa49642909cfcf9c", "c6cf184a07c95716")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("[]", ()),
        ('["Violence", "Hate"]', ("Hate", "Violence")),
        (' \n["hate", "SELF-HARM", "Hate"]\n', ("Hate", "Self-Harm")),
        ('```json\n["Sexuality"]\n```', ("Sexuality",)),
        ("```\n[]\n```", ()),
        (json.dumps(CATEGORIES), CATEGORIES),
        ("", None),
        ("none", None),
        ("Hate, Violence", None),
        ('["Hate"', None),
        ('["Hate", "Gore"]', None),
        ('["Hate", 3]', None),
        ('["Hate", null]', None),
        ('{"Hate": true}', None),
        ('"Hate"', None),
        ("NaN", None),
        ('[["Hate"]]', None),
        ("['Hate']", None),
        ('[] would be wrong: ban ["Hate"]', None),
        ("I ban nothing: []", None),
        ("[" * 100_000, None),
    ],
)
def test_parsing(reply, expected):
    assert parse_categories(reply) == expected


def test_bans_of_ones_own_are_added_to_any_reply():
    profile = UserProfile.from_mapping({"age": 30, "gender": "male", "bans": ["Hate"]})
    assert decide(profile, "[]").banned == ("Hate",) and decide(profile, '["Violence"]').banned == ("Hate", "Violence")


def test_the_rule_for_minors_is_added_and_no_reply_takes_it_away():
    assert decide(ADULT, "[]") == Answer((), ())  # an adult's bans are the model's to propose
    assert decide(ADULT, '["Hate"]') == Answer(("Hate",), ("Hate",))
    assert decide(CHILD, "[]") == Answer((), MINOR_BANS)
    assert decide(CHILD, '["Harassment"]') == Answer(("Harassment",), ("Harassment", *MINOR_BANS))
    assert decide(TEEN, '["Hate"]') == Answer(("Hate",), ("Hate", "Propaganda", "Sexuality"))
    assert decide(ADULT, "no idea") == Answer(None, CATEGORIES) == decide(CHILD, "")


@settings(max_examples=500, deadline=None)
@given(
    reply=st.one_of(
        st.text(),
        st.lists(st.sampled_from([*CATEGORIES, "hate", "Gore", ""])).map(json.dumps),
        st.lists(st.sampled_from(['["Hate"]', "[]", "```", "json", "\n", ",", "ban", "Violence"])).map("".join),
    ),
    user=st.sampled_from(sample_population(300)),
)
def test_any_reply_gives_a_ban_list_that_is_safe_for_minors(reply, user):
    answer = decide(user, reply)
    assert set(answer.banned) <= set(CATEGORIES) and list(answer.banned) == sorted(set(answer.banned))
    if answer.proposed is None:
        assert answer.banned == CATEGORIES
    else:
        assert set(answer.proposed) <= set(answer.banned)
        assert all(category.lower() in reply.lower() for category in answer.proposed)
    if user.age < 20:
        assert set(banned_categories(user)) <= set(answer.banned)


def test_everything_is_counted():
    replies = ['["Hate", "Violence"]', "[]", "?", json.dumps(MINOR_BANS)]
    counts = count_answers(map(decide, (ADULT, CHILD, TEEN, CHILD), replies))
    assert counts.pop("asked") == 4
    assert counts.pop("unparsable") == 1
    assert counts.pop("stricter by the rule for minors") == 1
    proposed = {category: counts.pop(f"{category} proposed") for category in CATEGORIES}
    banned = {category: counts.pop(f"{category} banned") for category in CATEGORIES}
    assert not counts
    assert list(proposed.values()) == [0, 2, 0, 1, 1, 1, 2]
    assert list(banned.values()) == [1, 4, 1, 3, 3, 3, 4]
