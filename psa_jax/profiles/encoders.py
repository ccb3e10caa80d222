"""Encoders: a profile to its embedding `u` of D numbers."""

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from psa_jax.errors import PSAError
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.encoder_registry import ENCODERS, EncoderEntry
from psa_jax.profiles.schema import ATTRIBUTES, CATEGORIES, MAX_AGE, UserProfile

EARLIER = "earlier_fingerprint"
"""The note of an encoder, and of its tables, that holds what earlier versions called the same encoder."""


@runtime_checkable
class Encoder(Protocol):
    """Turns profiles into embeddings. Two encoders with one fingerprint give the same numbers."""

    @property
    def name(self) -> str:
        """What tables and adapters call the encoder."""
        ...

    @property
    def dim(self) -> int:
        """D, the length of an embedding."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that differs between encoders that give different numbers."""
        ...

    @property
    def notes(self) -> Mapping[str, str]:
        """Further facts for the table; they may grow while profiles are encoded."""
        ...

    def encode(self, profiles: Sequence[UserProfile]) -> Float32[np.ndarray, "n d"]:
        """The embedding of each of n profiles."""
        ...


@dataclass(frozen=True)
class FeatureEncoder:
    """Features of the profile itself: age / 100, one-hot attributes and, with `ban_bits`, one bit for each category.

    The bits state which categories are banned. Without them an adapter must learn that from the pairs.

    Args:
      ban_bits: whether the bits are among the features.
    """

    ban_bits: bool = True

    VERSION = 1  # raise it when the numbers change while the field names stay

    @property
    def name(self) -> str:
        """The encoder's key in `ENCODERS`."""
        return "features" if self.ban_bits else "features-no-bans"

    @property
    def fields(self) -> tuple[str, ...]:
        """What each of the D columns holds."""
        one_hot = [f"{name}={value}" for name, each in ATTRIBUTES.items() for value in each.values]
        return ("age/100", *one_hot, *(f"bans={category}" for category in CATEGORIES if self.ban_bits))

    @property
    def dim(self) -> int:
        """D, the number of columns."""
        return len(self.fields)

    @property
    def fingerprint(self) -> str:
        """Name, version and hash of the column names."""
        digest = hashlib.sha256("\n".join(self.fields).encode()).hexdigest()
        return f"{self.name}-v{self.VERSION}-{digest[:16]}"

    @property
    def notes(self) -> Mapping[str, str]:
        """None."""
        return {}

    def encode(self, profiles: Sequence[UserProfile]) -> Float32[np.ndarray, "n d"]:
        """One row a profile, every number in [0, 1].

        Raises:
          PSAError: a profile with bans of its own, and an encoder without the bits that would say so.
        """
        if not self.ban_bits and any(profile.bans for profile in profiles):
            raise PSAError(
                f"encoder {self.name!r} has no place for a profile's own bans; use features, or leave bans out"
            )
        rows = [self._encode_one(profile) for profile in profiles]
        return np.asarray(rows, dtype=np.float32).reshape(len(rows), self.dim)  # [0, D] when there are none

    def _encode_one(self, profile: UserProfile) -> list[float]:
        row = [profile.age / MAX_AGE]
        for name, each in ATTRIBUTES.items():
            row += [float(getattr(profile, name) == value) for value in each.values]
        if self.ban_bits:
            banned = banned_categories(profile)
            row += [float(category in banned) for category in CATEGORIES]
        return row


def fingerprints(encoder: str, notes: Mapping[str, str]) -> tuple[str, ...]:
    """The fingerprints by which an encoder is known: its own and, if the notes have one, that of earlier versions.

    Args:
      encoder: its fingerprint.
      notes: its notes, or those of a table.
    """
    return (encoder, notes[EARLIER]) if EARLIER in notes else (encoder,)


def get_encoder(name: str) -> Encoder:
    """Makes an encoder that needs no model.

    Args:
      name: its key in `ENCODERS`.

    Raises:
      PSAError: there is none of that name, or it needs a model.
    """
    entry = _entry(name)
    if entry.model is not None:
        raise PSAError(
            f"encoder {name!r} needs its language model, which is not loaded here; make a table of the users with it "
            f"(psa-jax encode users.csv --encoder={name} --model=DIR --out=FILE) and use --user ID with --table FILE"
        )
    return _maker(entry)(**entry.options)


def load_encoder(name: str, model: Path | None, **options: Any) -> Encoder:
    """Makes any encoder.

    Args:
      name: its key in `ENCODERS`.
      model: the folder of its model, for encoders that need one.
      options: passed to the encoder that needs a model.

    Raises:
      PSAError: there is none of that name, or its model is missing.
    """
    entry = _entry(name)
    if entry.model is None:
        return get_encoder(name)
    if model is None:
        raise PSAError(f"--encoder={name} needs --model DIR, {entry.model}")
    return _maker(entry)(model, **entry.options, **options)


def _entry(name: str) -> EncoderEntry:
    if name not in ENCODERS:
        raise PSAError(f"encoder {name!r} does not exist; use one of: {', '.join(ENCODERS)}")
    return ENCODERS[name]


def _maker(entry: EncoderEntry) -> Callable[..., Encoder]:
    """Imported late: an encoder may bring a language model."""
    module, _, name = entry.maker.partition(":")
    return getattr(importlib.import_module(module), name)
