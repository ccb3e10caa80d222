"""User profiles: the attributes, their closed sets of values, and one check when a profile is made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from psa_jax.categories import CATEGORIES as CATEGORIES
from psa_jax.errors import PSAError
from psa_jax.json_input import parse_json

AGE_GROUPS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "infants & toddlers": (0, 3),
        "children": (4, 12),
        "adolescents": (13, 19),
        "young adults": (20, 34),
        "middle-aged": (35, 59),
        "young elderly": (60, 74),
        "elderly": (75, 89),
        "long-lived elderly": (90, 100),
    }
)
"""Name → (youngest, oldest) in whole years, both included; in order of age."""
MAX_AGE = 100
GENDERS = ("male", "female")
RELIGIONS = ("Christianity", "Islam", "Buddhism", "None")  # "None" is a value like the others
PHYSICAL_CONDITIONS = ("healthy", "visual impairment", "hearing impairment", "intellectual disability")
MENTAL_CONDITIONS = (
    "healthy",
    "depression",
    "anxiety",
    "war",
    "sexual assault",
    "major accidents",
    "natural disasters",
)


@dataclass(frozen=True)
class Attribute:
    """An attribute of a profile with a closed set of values.

    The features encoder has one column for each value, and a language model reads the value.

    Args:
      column: its spelling in users.csv and in SAGE's `user_data`.
      values: all that it may have, in the order of the encoder's columns.
      template: its field in prompts, such as AGE_GROUP for `<<AGE_GROUP>>`.
      neutral: the value of a profile that does not give it, which bans nothing; None if it has to be given (or, as the
        age group, follows from the age).
    """

    column: str
    values: tuple[str, ...]
    template: str
    neutral: str | None = None


def _attribute(*args: Any, **kwargs: Any) -> Any:
    return field(metadata={"attribute": Attribute(*args, **kwargs)})


@dataclass(frozen=True, repr=False)
class UserProfile:
    """One user. The data are sensitive: `repr` shows only the id.

    Args:
      user_id: seven digits, or None for an anonymous profile.
      age: whole years, 0 to 100.
      age_group: the key of AGE_GROUPS that holds `age`.
      gender, religion, physical_condition, mental_condition: one of the values in `ATTRIBUTES`.
      bans: categories that the user bans beside those of the ban rules; nothing here allows what the rules ban.

    Raises:
      PSAError: a value is outside its set, or the age outside its group.
    """

    user_id: str | None
    age: int
    # A new attribute is a line here; what it bans goes into `bans`, its probabilities into `population`.
    age_group: str = _attribute("Age_Group", tuple(AGE_GROUPS), "AGE_GROUP")
    gender: str = _attribute("Gender", GENDERS, "GENDER")
    religion: str = _attribute("Religion", RELIGIONS, "RELIGION", neutral="None")
    physical_condition: str = _attribute("Physical_Condition", PHYSICAL_CONDITIONS, "PHYSICAL", neutral="healthy")
    mental_condition: str = _attribute("Mental_Condition", MENTAL_CONDITIONS, "MENTAL", neutral="healthy")
    bans: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check({name: getattr(self, name) for name in COLUMNS})
        _check_bans(self.bans)

    def __repr__(self) -> str:
        return f"UserProfile(user_id={self.user_id!r})"

    @classmethod
    def from_mapping(cls, mapping: object) -> "UserProfile":
        """Reads `{"age": 9, "gender": "female"}` or the CSV/SAGE spelling `{"Age": "9", …}`.

        Age and gender are required. A missing age group follows from the age; a missing religion is "None", a missing
        condition "healthy", a missing id None (anonymous), missing bans none. An age may be an int or its digits, as
        CSV has it; bans are a list of categories.

        Raises:
          PSAError: an unknown or repeated key, a missing age or gender, a bad value.
        """
        if not isinstance(mapping, Mapping):
            raise PSAError(f"profile: expected key-value pairs, got {type(mapping).__name__}")
        values: dict[str, object] = {}
        for number, (key, value) in enumerate(mapping.items(), start=1):
            name = _NAMES.get(key) if isinstance(key, str) else None
            if name is None:
                raise PSAError(
                    f"profile: key {number} of {len(mapping)} is unknown; allowed keys: {', '.join([*COLUMNS, 'bans'])}"
                )
            if name in values:
                raise PSAError(f'profile: "{name}" is given twice; give it once')
            values[name] = value
        required = {"age": f"0 to {MAX_AGE}"}
        required |= {name: ", ".join(each.values) for name, each in ATTRIBUTES.items() if _is_required(name)}
        for name, allowed in required.items():
            if name not in values:
                raise PSAError(f'profile: "{name}" is missing; give one of: {allowed}')
        values["age"] = age = _parse_age(values["age"])
        neutral = {name: each.neutral for name, each in ATTRIBUTES.items() if each.neutral is not None}
        values = {"user_id": None, "age_group": age_group_of(age), **neutral, **values}
        bans = values.pop("bans", ())
        _check(values)
        _check_bans(bans)
        return cls(**values, bans=tuple(category for category in CATEGORIES if category in bans))

    @classmethod
    def from_json(cls, text: str) -> "UserProfile":
        """Reads a profile typed as a JSON object, with the rules of `from_mapping`.

        Raises:
          PSAError: not JSON, a key given twice, or anything `from_mapping` refuses.
        """
        try:
            parsed = parse_json(text, "profile", limit=10_000, quote=False)
        except PSAError as error:
            raise PSAError(f'{error}; write it like {{"age": 9, "gender": "female"}}') from error
        return cls.from_mapping(parsed)

    def to_mapping(self) -> dict[str, str | int | list[str] | None]:
        """The profile in the CSV/SAGE spelling, in the order of the file; `from_mapping` reads it back.

        Bans of its own, which SAGE does not have, are there only where there are any.
        """
        own = {OWN_BANS: list(self.bans)} if self.bans else {}
        return {column: getattr(self, name) for name, column in COLUMNS.items()} | own


ATTRIBUTES: Mapping[str, Attribute] = MappingProxyType(
    {each.name: each.metadata["attribute"] for each in fields(UserProfile) if each.metadata}
)
"""Field of `UserProfile` → its attribute, for those with a closed set of values, in the order of the file."""

COLUMNS: Mapping[str, str] = MappingProxyType(
    {"user_id": "User_ID", "age": "Age", **{name: each.column for name, each in ATTRIBUTES.items()}}
)
"""Field of `UserProfile` → its spelling in users.csv and in SAGE's `user_data`, in the order of the file."""

OWN_BANS = "Own_Bans"
"""The spelling of a profile's own bans in users.csv, a column that may be absent."""

_NAMES = {spelling: name for name, column in COLUMNS.items() for spelling in (name, column)}
_NAMES |= {"bans": "bans", OWN_BANS: "bans"}


def _is_required(name: str) -> bool:
    """The age group follows from the age; every other attribute has a neutral value or must be given."""
    return ATTRIBUTES[name].neutral is None and name != "age_group"


def describe() -> str:
    """The keys of a profile with the values that each may have, for `--help`."""
    words = {"age": f"0 to {MAX_AGE}, required"}
    for name, each in ATTRIBUTES.items():
        words[name] = ", ".join(each.values) + ("; required" if _is_required(name) else "")
    words["age_group"] += "; follows from the age"
    words["bans"] = f"list of {', '.join(CATEGORIES)}; added to what the ban rules say"
    return "; ".join(f"{name} ({words[name]})" for name in words)


def age_group_of(age: object) -> str:
    """Name of the age group that holds `age`.

    Raises:
      PSAError: not a whole number from 0 to 100.
    """
    # bool is an int in Python, but True is not an age.
    if isinstance(age, int) and not isinstance(age, bool):
        for name, (low, high) in AGE_GROUPS.items():
            if low <= age <= high:
                return name
    raise _error("age", f"whole numbers from 0 to {MAX_AGE}")


def check_user_id(user_id: object) -> str:
    """Returns `user_id` if it is a string of seven digits.

    Raises:
      PSAError: it is anything else.
    """
    if isinstance(user_id, str) and re.fullmatch("[0-9]{7}", user_id):
        return user_id
    raise _error("user_id", 'seven digits as text, such as "0000797"')


def _check(values: Mapping[str, object]) -> None:
    """Refuses the first value that is not allowed."""
    if values["user_id"] is not None:
        check_user_id(values["user_id"])
    group = age_group_of(values["age"])
    for name, each in ATTRIBUTES.items():
        value = values[name]
        if not isinstance(value, str) or value not in each.values:
            raise _error(name, ", ".join(each.values) + _hint(name, value))
    if values["age_group"] != group:
        raise _error("age_group", "the group that the age is in; correct one of them, or leave it out")


def _check_bans(bans: object) -> None:
    """Refuses what is no list of different categories; a text would be read letter by letter."""
    known = isinstance(bans, list | tuple) and all(isinstance(each, str) and each in CATEGORIES for each in bans)
    if not known or len(set(bans)) != len(bans):
        raise _error("bans", f"a list of different categories, of {', '.join(CATEGORIES)}")


def _parse_age(age: object) -> object:
    """Digits, as CSV holds them, become an int; everything else is left for the check to refuse."""
    return int(age) if isinstance(age, str) and re.fullmatch("0|[1-9][0-9]{0,2}", age) else age


def _hint(name: str, value: object) -> str:
    """Explains the most common mistake: readers such as pandas turn the text None into NaN or an empty cell."""
    lost = name == "religion" and (value is None or value == "" or isinstance(value, float))
    return ' (no religion is the text "None")' if lost else ""


def _error(name: str, allowed: str) -> PSAError:
    # Without the value: it is personal, and errors end up in the logs of jobs.
    return PSAError(f'profile: "{name}" has a value that is not allowed; allowed: {allowed}')
