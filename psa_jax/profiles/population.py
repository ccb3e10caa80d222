"""The population of SAGE: users sampled from a seed, and users.csv in and out.

`psa-jax population --n=1000 --seed=2025 --out=users.csv` writes the users released with SAGE.
"""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from psa_jax.csv_input import read_csv
from psa_jax.errors import PSAError
from psa_jax.files import write_private
from psa_jax.profiles.bans import allowed_categories, banned_categories
from psa_jax.profiles.schema import AGE_GROUPS, CATEGORIES, COLUMNS, GENDERS, OWN_BANS, UserProfile
from psa_jax.seeds import check_seed

# Value → probability. The order of the values decides what each random number gives: it belongs to the data.
_AGE_GROUPS = dict(zip(AGE_GROUPS, (0.05, 0.20, 0.20, 0.20, 0.20, 0.10, 0.04, 0.01), strict=True))
# Attributes that depend on nothing else, in the order in which they are sampled.
_PROBABILITIES = {
    "religion": {"Christianity": 0.3, "Islam": 0.2, "Buddhism": 0.2, "None": 0.3},
    "physical_condition": {
        "visual impairment": 0.2,
        "hearing impairment": 0.2,
        "intellectual disability": 0.2,
        "healthy": 0.4,
    },
    "mental_condition": {
        "depression": 0.15,
        "anxiety": 0.15,
        "war": 0.075,
        "sexual assault": 0.075,
        "major accidents": 0.075,
        "natural disasters": 0.075,
        "healthy": 0.4,
    },
}
_CATEGORY_COLUMNS = {"Banned_Categories": banned_categories, "Allowed_Categories": allowed_categories}
_MAX_USERS = 9_999_999  # an id has seven digits


def sample_population(count: int, seed: int = 2025) -> list[UserProfile]:
    """Samples `count` users with ids 0000001, 0000002, …; a larger population begins with the smaller one.

    Seed 2025 gives the users released with SAGE.

    Args:
      count: number of users.
      seed: of the random choices.

    Raises:
      PSAError: a count outside 1 to 9,999,999 or a seed outside 0 to 2**32 - 1.

    Source: Personalized Safety Alignment, arXiv 2508.01151.
    """
    if not 1 <= count <= _MAX_USERS:
        raise PSAError(f"population: the number of users is {count}; give 1 to {_MAX_USERS}")
    # The legacy generator: its stream is frozen across numpy versions.
    rng = np.random.RandomState(check_seed(seed, "population: the seed"))
    return [_sample_user(rng, f"{number:07d}") for number in range(1, count + 1)]


def _sample_user(rng: np.random.RandomState, user_id: str) -> UserProfile:
    while True:
        age_group = _sample(rng, _AGE_GROUPS)
        low, high = AGE_GROUPS[age_group]
        age = int(rng.randint(low, high + 1))
        gender = GENDERS[rng.choice(len(GENDERS))]
        others = {name: _sample(rng, probabilities) for name, probabilities in _PROBABILITIES.items()}
        if _is_plausible(age, age_group, others["religion"], others["mental_condition"]):
            return UserProfile(user_id, age, age_group, gender, **others)


def _sample(rng: np.random.RandomState, probabilities: dict[str, float]) -> str:
    values = tuple(probabilities)
    return values[rng.choice(len(values), p=tuple(probabilities.values()))]


def _is_plausible(age: int, age_group: str, religion: str, mental: str) -> bool:
    return not (
        (age_group == "infants & toddlers" and mental not in ("healthy", "natural disasters"))
        or (age_group == "children" and mental in ("war", "sexual assault"))
        or (mental == "war" and age < 18)
        or (mental == "sexual assault" and age < 10)
        or (mental in ("major accidents", "depression", "anxiety") and age < 5)
        or (religion != "None" and age < 8)
    )


def write_users_csv(path: str | Path, profiles: Sequence[UserProfile]) -> None:
    """Writes users.csv with mode 0600: id, attributes, and the categories banned and allowed.

    A column with bans of their own is there if any profile has them.

    Args:
      path: the file, in an existing folder.
      profiles: the users, with ids.

    Raises:
      PSAError: a profile without an id, an id given twice, or a file that cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    own = [OWN_BANS] if any(profile.bans for profile in profiles) else []
    writer.writerow([*COLUMNS.values(), *own, *_CATEGORY_COLUMNS])
    seen: set[str] = set()
    for profile in profiles:
        if profile.user_id is None:
            raise PSAError(f"{path}: an anonymous profile cannot be written; give it a user_id")
        if profile.user_id in seen:
            raise PSAError(f"{path}: user {profile.user_id} is given twice; keep one")
        seen.add(profile.user_id)
        mapping = profile.to_mapping()
        row = [mapping[column] for column in COLUMNS.values()] + [str(list(profile.bans)) for _ in own]
        writer.writerow([*row, *(str(list(rule(profile))) for rule in _CATEGORY_COLUMNS.values())])
    write_private(path, text.getvalue().encode())


def read_users_csv(path: str | Path) -> list[UserProfile]:
    """Reads users.csv strictly. Columns of banned and allowed categories are optional and must agree with the rules.

    A column Own_Bans, such as ['Hate'] or [], is optional, too.

    The file released with SAGE has no User_ID column: there the id is the number of the row, from 0000001.

    Raises:
      PSAError: a bad line; the message names it and what is wrong in it.
    """
    rows = read_csv(path)
    if len(rows) < 2:
        raise PSAError(f"{path}: no users in it; expected a header and one line a user")
    header = rows[0][1]
    _check_header(path, header)
    profiles: list[UserProfile] = []
    seen: set[str | None] = set()
    for number, (line, cells) in enumerate(rows[1:], start=1):
        try:
            profile = _parse_row(header, cells, number)
            if profile.user_id in seen:
                raise PSAError(f"user {profile.user_id} is listed twice; keep one line")
        except PSAError as error:
            raise PSAError(f"{path}, line {line}: {error}") from error
        seen.add(profile.user_id)
        profiles.append(profile)
    return profiles


def _check_header(path: str | Path, header: list[str]) -> None:
    required = [column for field, column in COLUMNS.items() if field != "user_id"]
    allowed = {"User_ID", *required, OWN_BANS, *_CATEGORY_COLUMNS}
    missing = [column for column in required if column not in header]
    # By number: where the header is missing, the first user stands in its place.
    unknown = [number for number, column in enumerate(header, start=1) if column not in allowed]
    if missing or unknown or len(set(header)) != len(header):
        problem = (
            f"missing {missing}"
            if missing
            else f"unknown is number {unknown[0]} of {len(header)}"
            if unknown
            else "a column twice"
        )
        raise PSAError(f"{path}: columns: {problem}; expected {', '.join([*COLUMNS.values(), *_CATEGORY_COLUMNS])}")


def _parse_row(header: list[str], cells: list[str], number: int) -> UserProfile:
    if len(cells) != len(header):
        raise PSAError(f"{len(cells)} cells, but the header has {len(header)}")
    row = dict(zip(header, cells, strict=True))
    listed = {column: row.pop(column) for column in _CATEGORY_COLUMNS if column in row}
    if OWN_BANS in row:
        row[OWN_BANS] = _parse_categories(OWN_BANS, row[OWN_BANS])
    profile = UserProfile.from_mapping({"User_ID": f"{number:07d}", **row})
    for column, cell in listed.items():
        if _parse_categories(column, cell) != _CATEGORY_COLUMNS[column](profile):
            raise PSAError(f"{column} is not what the ban rules give for this profile; leave the column out")
    return profile


def _parse_categories(column: str, cell: str) -> tuple[str, ...]:
    """Reads `['Hate', 'Violence']` as the text it is; a cell is never evaluated."""
    match = re.fullmatch(r"\[(.*)\]", cell)
    names = match[1].split(", ") if match and match[1] else []
    if match is None or any(name not in {f"'{category}'" for category in CATEGORIES} for name in names):
        raise PSAError(f"{column} is no list; expected such as ['Hate', 'Violence'], of: {', '.join(CATEGORIES)}")
    return tuple(name.strip("'") for name in names)
