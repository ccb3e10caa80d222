"""Encoders: profile -> embedding `u` of D numbers."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from psa_jax.errors import PSAError
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.schema import (
    AGE_GROUPS,
    CATEGORIES,
    GENDERS,
    MAX_AGE,
    MENTAL_CONDITIONS,
    PHYSICAL_CONDITIONS,
    RELIGIONS,
    UserProfile,
)

EARLIER = "earlier_fingerprint"
"""The note of an encoder, and of its tables, that holds what earlier versions called the same encoder."""


@runtime_checkable
class Encoder(Protocol):
    """Turns profiles into embeddings. Two encoders with one fingerprint give the same numbers.

    `notes` are further facts for the table; they may grow while profiles are encoded.
    """

    @property
    def name(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def notes(self) -> Mapping[str, str]: ...

    def encode(self, profiles: Sequence[UserProfile]) -> Float32[np.ndarray, "n d"]: ...


_ONE_HOT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "age_group": tuple(AGE_GROUPS),
        "gender": GENDERS,
        "religion": RELIGIONS,
        "physical_condition": PHYSICAL_CONDITIONS,
        "mental_condition": MENTAL_CONDITIONS,
    }
)


@dataclass(frozen=True)
class FeatureEncoder:
    """Structured features, no language model: age / 100, one-hot attributes and, with `ban_bits`, one bit a category.

    The bits state the policy's answer: without them an adapter must learn the policy from pairs alone.
    """

    ban_bits: bool = True

    VERSION = 1  # raise it when the numbers change while the field names stay

    @property
    def name(self) -> str:
        return "features" if self.ban_bits else "features-no-bans"

    @property
    def fields(self) -> tuple[str, ...]:
        """What each of the D columns holds."""
        one_hot = [f"{field}={value}" for field, values in _ONE_HOT.items() for value in values]
        return ("age/100", *one_hot, *(f"bans={category}" for category in CATEGORIES if self.ban_bits))

    @property
    def dim(self) -> int:
        return len(self.fields)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.fields).encode()).hexdigest()
        return f"{self.name}-v{self.VERSION}-{digest[:16]}"

    @property
    def notes(self) -> Mapping[str, str]:
        return {}

    def encode(self, profiles: Sequence[UserProfile]) -> Float32[np.ndarray, "n d"]:
        """One row a profile, every number in [0, 1]."""
        rows = [self._encode_one(profile) for profile in profiles]
        return np.asarray(rows, dtype=np.float32).reshape(len(rows), self.dim)  # [0, D] when there are none

    def _encode_one(self, profile: UserProfile) -> list[float]:
        row = [profile.age / MAX_AGE]
        for field, values in _ONE_HOT.items():
            row += [float(getattr(profile, field) == value) for value in values]
        if self.ban_bits:
            banned = banned_categories(profile)
            row += [float(category in banned) for category in CATEGORIES]
        return row


def fingerprints(encoder: str, notes: Mapping[str, str]) -> tuple[str, ...]:
    """All that an encoder, or the one of a table, is known by: its fingerprint and, by the notes, an earlier one."""
    return (encoder, notes[EARLIER]) if EARLIER in notes else (encoder,)


# Makers, not encoders. `qwen` (`psa_jax.profiles.qwen_encoder`) is not among them: it needs a model folder.
ENCODERS: Mapping[str, Callable[[], Encoder]] = MappingProxyType(
    {
        "features": FeatureEncoder,
        "features-no-bans": lambda: FeatureEncoder(ban_bits=False),
    }
)


def get_encoder(name: str) -> Encoder:
    """The encoder called `name`.

    Raises:
      PSAError: there is none.
    """
    if name not in ENCODERS:
        raise PSAError(f"encoder {name!r} does not exist; use one of: {', '.join(ENCODERS)}")
    return ENCODERS[name]()
