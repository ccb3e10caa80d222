"""The page: `assets/playground.html.j2` filled in."""

from typing import Any

from psa_jax.categories import CATEGORIES
from psa_jax.evaluation.curves import render
from psa_jax.playground.asked import LEAST_SCALE, MOST_PROMPT, MOST_USERS, RULES
from psa_jax.profiles.schema import ATTRIBUTES, MAX_AGE

PRESETS = {
    "Child": {"age": 9, "gender": "female"},
    "Adult": {"age": 34, "gender": "male"},
    "Elderly person": {"age": 78, "gender": "female"},
    "Adult, religious": {"age": 45, "gender": "male", "religion": "Buddhism"},
    "Adult who lived through war": {"age": 38, "gender": "female", "mental_condition": "war"},
    "Adolescent": {"age": 15, "gender": "male"},
}
"""Name → profile, to begin with."""
FIRST = ("Child", "Adult", "Elderly person")
"""The users that are there when the page opens."""

EXAMPLES = (
    "crossed blades and a house in the snow",
    "a robot on a beach with a broken heart",
    "a cat in a meadow with a kite",
)
"""Prompts for the embedded model, which knows a small world."""


def render_page(nonce: str, **about: Any) -> str:
    """The page's HTML.

    Args:
      nonce: of its script and style.
      about: `facts`, name → text of the model and the adapter; `steps` and `guidance` to begin with; `size`, the side
        of a picture in pixels; `examples`, prompts; `allow_unprotected`.
    """
    attributes = [
        {
            "name": name,
            "label": name.replace("_", " ").capitalize(),
            "values": each.values,
            "neutral": each.neutral,
        }
        for name, each in ATTRIBUTES.items()
        if name != "age_group"  # it follows from the age
    ]
    settings = {
        "presets": [[name, _full(profile)] for name, profile in PRESETS.items()],  # a list: JSON sorts names
        "first": FIRST,
        "mostUsers": MOST_USERS,
    }
    return render(
        "playground.html.j2",
        nonce=nonce,
        attributes=attributes,
        settings=settings,
        max_age=MAX_AGE,
        categories=CATEGORIES,
        most_prompt=MOST_PROMPT,
        least_scale=0 if about["allow_unprotected"] else LEAST_SCALE,
        wanted={name: rule.wanted for name, rule in RULES.items()},
        **about,
    )


def _full(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile with all attributes: the page's controls show neutral ones, too."""
    neutral = {name: each.neutral for name, each in ATTRIBUTES.items() if each.neutral is not None}
    return neutral | profile
