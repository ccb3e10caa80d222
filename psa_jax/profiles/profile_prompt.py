"""Prompts about a profile for a language model, and how its reply to a question about bans is read."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from psa_jax.errors import PSAError
from psa_jax.files import read_bytes
from psa_jax.json_input import parse_json
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.schema import ATTRIBUTES, CATEGORIES, UserProfile

_FIELD = re.compile(r"<<([^<>]*)>>")
_NAMES = {"AGE": "age", **{each.template: name for name, each in ATTRIBUTES.items()}}
FIELDS = (*_NAMES, "BANNED", "ALLOWED")
"""Fields of a template."""
_MINORS = ("infants & toddlers", "children", "adolescents")

_PERSON = "Person\n- age: <<AGE>> (<<AGE_GROUP>>)\n" + "".join(
    f"- {name.replace('_', ' ')}: <<{each.template}>>\n" for name, each in ATTRIBUTES.items() if name != "age_group"
)


@dataclass(frozen=True)
class Template:
    """A text with fields such as `<<AGE>>`. All fields are filled in one pass, so values are not searched for fields.

    Args:
      text: with any of FIELDS, any number of times; lists of categories read like ['Hate', 'Violence'].
      where: the template's name in errors.

    Raises:
      PSAError: an unknown field, or no field, which would give all users the same text.
    """

    text: str
    where: str = "template"

    def __post_init__(self) -> None:
        fields = _FIELD.findall(self.text)
        for field in fields:
            if field not in FIELDS:
                raise PSAError(f"{self.where}: field <<{field}>> does not exist; use of: {', '.join(FIELDS)}")
        if not fields:
            raise PSAError(f"{self.where}: no field in it; use some of: <<{'>>, <<'.join(FIELDS)}>>")

    @property
    def hash(self) -> str:
        """First 16 digits of the sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def render(self, profile: UserProfile, banned: Iterable[str]) -> str:
        """Fills the fields for one profile.

        Args:
          profile: the user.
          banned: the categories for `<<BANNED>>`; the others are those for `<<ALLOWED>>`.
        """
        banned = set(banned)
        values = {field: str(getattr(profile, name)) for field, name in _NAMES.items()}
        values["BANNED"] = str([category for category in CATEGORIES if category in banned])
        values["ALLOWED"] = str([category for category in CATEGORIES if category not in banned])
        return _FIELD.sub(lambda match: values[match[1]], self.text)


def read_template(path: str | Path) -> Template:
    """Reads a template from a UTF-8 text file; line ends become "\\n".

    Raises:
      PSAError: the file is unreadable or not a template.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PSAError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    return Template(text.replace("\r\n", "\n"), str(path))


PROFILE = Template(
    "Someone is about to see pictures that a computer draws on request. In one paragraph, say what such a picture may "
    "show this person and what it must leave out, and why that suits their age, beliefs and health.\n\n"
    + _PERSON
    + "\nPictures for this person\n- must leave out: <<BANNED>>\n- may show: <<ALLOWED>>\n",
    "profile prompt",
)
"""The text whose token states become a profile's embedding, unless a template file is given."""

QUESTION = Template(
    "Someone is about to see pictures that a computer draws on request. Decide which categories of pictures could harm "
    "or offend this person and must be left out.\n\n"
    + f"Categories: {', '.join(CATEGORIES)}\n\n"
    + _PERSON
    + "\nReply with nothing but a JSON list of categories, spelt as above. Reply [] if none must be left out.\n",
    "question",
)
"""The question to a model that is to propose the bans itself."""


@dataclass(frozen=True)
class Answer:
    """A reply, read.

    Attributes:
      proposed: the categories in the reply, sorted; None if it could not be parsed.
      banned: the categories that are banned in the end, sorted.
    """

    proposed: tuple[str, ...] | None
    banned: tuple[str, ...]


def parse_categories(reply: str) -> tuple[str, ...] | None:
    """Parses a reply that is one JSON list of categories: the categories, sorted, each once; None for other replies.

    Case does not matter, and a Markdown code fence around the list is removed. A list inside other text is not parsed,
    since the text may contradict it.
    """
    text = reply.strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL):
        text = fenced[1]
    try:
        items = parse_json(text, "reply", list)
    except PSAError:
        return None
    known = {category.lower(): category for category in CATEGORIES}
    if not all(isinstance(item, str) and item.lower() in known for item in items):
        return None
    return tuple(sorted({known[item.lower()] for item in items}))


def decide(profile: UserProfile, reply: str) -> Answer:
    """Decides the bans of a profile from a model's reply.

    Args:
      profile: the user.
      reply: the model's text.

    A reply that cannot be parsed bans all categories. The profile's own bans are always added, and for minors those of
    the ban rules.
    """
    proposed = parse_categories(reply)
    rule = banned_categories(profile) if profile.age_group in _MINORS else profile.bans
    return Answer(proposed, tuple(sorted({*(CATEGORIES if proposed is None else proposed), *rule})))


def count_answers(answers: Iterable[Answer]) -> dict[str, int]:
    """Counts answers: all, those not parsed, those made stricter for minors; for each category, proposed and banned."""
    answers = list(answers)
    parsed = [answer for answer in answers if answer.proposed is not None]
    counts = {
        "asked": len(answers),
        "unparsable": len(answers) - len(parsed),
        "stricter by the rule for minors": sum(answer.banned != answer.proposed for answer in parsed),
    }
    for category in CATEGORIES:
        counts[f"{category} proposed"] = sum(category in answer.proposed for answer in parsed)
        counts[f"{category} banned"] = sum(category in answer.banned for answer in answers)
    return counts
