"""A user profile: closed sets of values, checked once, when it is made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from psa_jax.errors import PSAError
from psa_jax.json_input import parse_json

# Name -> (youngest, oldest) in whole years, both included; in order of age.
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
CATEGORIES = ("Harassment", "Hate", "Propaganda", "Self-Harm", "Sexuality", "Shocking", "Violence")

# Field -> its spelling in users.csv and in SAGE's `user_data`, in the order of the file.
COLUMNS: Mapping[str, str] = MappingProxyType(
    {
        "user_id": "User_ID",
        "age": "Age",
        "age_group": "Age_Group",
        "gender": "Gender",
        "religion": "Religion",
        "physical_condition": "Physical_Condition",
        "mental_condition": "Mental_Condition",
    }
)
_FIELDS = {spelling: field for field, column in COLUMNS.items() for spelling in (field, column)}
_CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "age_group": tuple(AGE_GROUPS),
        "gender": GENDERS,
        "religion": RELIGIONS,
        "physical_condition": PHYSICAL_CONDITIONS,
        "mental_condition": MENTAL_CONDITIONS,
    }
)
# Neutral values: none of them bans anything. Age and gender have none, so they are required.
_DEFAULTS = {"user_id": None, "religion": "None", "physical_condition": "healthy", "mental_condition": "healthy"}


@dataclass(frozen=True, repr=False)
class UserProfile:
    """One user. Sensitive: `repr` shows the id and nothing else.

    Args:
      user_id: seven digits, or None for an anonymous profile.
      age: whole years, 0 to 100.
      age_group: the key of AGE_GROUPS that holds `age`.
      gender, religion, physical_condition, mental_condition: one of the sets above.

    Raises:
      PSAError: a value is outside its set, or the age outside its group.
    """

    user_id: str | None
    age: int
    age_group: str
    gender: str
    religion: str
    physical_condition: str
    mental_condition: str

    def __post_init__(self) -> None:
        _check({field: getattr(self, field) for field in COLUMNS})

    def __repr__(self) -> str:
        return f"UserProfile(user_id={self.user_id!r})"

    @classmethod
    def from_mapping(cls, mapping: object) -> "UserProfile":
        """Reads `{"age": 9, "gender": "female"}` or the CSV/SAGE spelling `{"Age": "9", …}`.

        Age and gender are required. A missing age group follows from the age; a missing religion is "None", a missing
        condition "healthy", a missing id None (anonymous). An age may be an int or its digits, as CSV has it.

        Raises:
          PSAError: an unknown or repeated key, a missing age or gender, a bad value.
        """
        if not isinstance(mapping, Mapping):
            raise PSAError(f"profile: expected key-value pairs, got {type(mapping).__name__}")
        values: dict[str, object] = {}
        for number, (key, value) in enumerate(mapping.items(), start=1):
            field = _FIELDS.get(key) if isinstance(key, str) else None
            if field is None:
                raise PSAError(
                    f"profile: key {number} of {len(mapping)} is unknown; allowed keys: {', '.join(COLUMNS)}"
                )
            if field in values:
                raise PSAError(f'profile: "{field}" is given twice; give it once')
            values[field] = value
        for field in ("age", "gender"):
            if field not in values:
                allowed = ", ".join(GENDERS) if field == "gender" else f"0 to {MAX_AGE}"
                raise PSAError(f'profile: "{field}" is missing; give one of: {allowed}')
        values["age"] = age = _parse_age(values["age"])
        values = {"age_group": age_group_of(age), **_DEFAULTS, **values}
        _check(values)
        return cls(**values)

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

    def to_mapping(self) -> dict[str, str | int | None]:
        """The profile in the CSV/SAGE spelling, in the order of the file; `from_mapping` reads it back."""
        return {column: getattr(self, field) for field, column in COLUMNS.items()}


def describe() -> str:
    """Keys of a profile and the values that each may have, for `--help`."""
    fields = {"age": f"0 to {MAX_AGE}, required", **{field: ", ".join(choices) for field, choices in _CHOICES.items()}}
    fields["age_group"] += "; follows from the age"
    fields["gender"] += "; required"
    return "; ".join(f"{field} ({fields[field]})" for field in COLUMNS if field in fields)


def age_group_of(age: object) -> str:
    """Name of the age group that holds `age`.

    Raises:
      PSAError: not a whole number from 0 to 100.
    """
    # bool is an int in Python, but True is no age.
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
    """Refuses the first field whose value is outside its set."""
    if values["user_id"] is not None:
        check_user_id(values["user_id"])
    group = age_group_of(values["age"])
    for field, choices in _CHOICES.items():
        value = values[field]
        if not isinstance(value, str) or value not in choices:
            raise _error(field, ", ".join(choices) + _hint(field, value))
    if values["age_group"] != group:
        raise _error("age_group", "the group that the age is in; correct one of them, or leave it out")


def _parse_age(age: object) -> object:
    """CSV holds text: plain digits become an int, anything else is left for the check to refuse."""
    return int(age) if isinstance(age, str) and re.fullmatch("0|[1-9][0-9]{0,2}", age) else age


def _hint(field: str, value: object) -> str:
    """The commonest mistake: readers such as pandas turn the text None into NaN or an empty cell."""
    lost = field == "religion" and (value is None or value == "" or isinstance(value, float))
    return ' (no religion is the text "None")' if lost else ""


def _error(field: str, allowed: str) -> PSAError:
    # Without the value: it tells about a person, and errors end up in the logs of jobs.
    return PSAError(f'profile: "{field}" has a value that is not allowed; allowed: {allowed}')
