"""Ban rules: a profile bans every category that one of its attributes bans, and those that it states itself."""

from collections.abc import Mapping
from types import MappingProxyType

from psa_jax.errors import PSAError
from psa_jax.profiles.schema import CATEGORIES, UserProfile

_MINOR = ("Hate", "Self-Harm", "Sexuality", "Shocking", "Violence")
_ELDER = ("Shocking", "Violence")
_RELIGIOUS = ("Propaganda", "Sexuality")

BANS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "age_group": {
            "infants & toddlers": _MINOR,
            "children": _MINOR,
            "adolescents": ("Sexuality",),
            "young elderly": _ELDER,
            "elderly": _ELDER,
            "long-lived elderly": _ELDER,
        },
        "religion": {"Christianity": _RELIGIOUS, "Islam": _RELIGIOUS, "Buddhism": _RELIGIOUS},
        "physical_condition": {"intellectual disability": ("Harassment", "Propaganda")},
        "mental_condition": {
            "depression": ("Self-Harm", "Shocking"),
            "anxiety": ("Self-Harm", "Shocking"),
            "war": ("Propaganda", "Violence"),
            "sexual assault": ("Harassment", "Sexuality", "Violence"),
            "major accidents": ("Shocking", "Violence"),
            "natural disasters": ("Shocking", "Violence"),
        },
    }
)
"""Field → value → banned categories; a value that is not listed bans nothing. Exact on all 1,001 users of SAGE."""


def banned_categories(profile: UserProfile) -> tuple[str, ...]:
    """Categories banned for this profile, sorted, each once: by the rules, and its own."""
    banned = {category for field, bans in BANS.items() for category in bans.get(getattr(profile, field), ())}
    return tuple(sorted(banned.union(profile.bans)))


def allowed_categories(profile: UserProfile) -> tuple[str, ...]:
    """Categories that are not banned for this profile, sorted."""
    banned = banned_categories(profile)
    return tuple(category for category in CATEGORIES if category not in banned)


def is_banned(profile: UserProfile, category: str) -> bool:
    """Whether a category is banned for a profile.

    Args:
      profile: the user.
      category: one of CATEGORIES.

    Raises:
      PSAError: no such category. A misspelt one must not pass for allowed.
    """
    if category not in CATEGORIES:
        raise PSAError(f"category {category!r} does not exist; use one of: {', '.join(CATEGORIES)}")
    return category in banned_categories(profile)
