"""The embedding of one user for an adapter, with every check that it is the adapter's encoder and scale."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from psa_jax.errors import PSAError
from psa_jax.profiles.encoder_registry import ENCODERS
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.own_bans import check_own_bans, check_table_with_own_bans
from psa_jax.profiles.schema import UserProfile
from psa_jax.profiles.table import EmbeddingTable


def user_embedding(
    adapter: Path,
    about: Mapping[str, Any],
    *,
    profile: str | UserProfile | None,
    user: str | None,
    table: Path | EmbeddingTable | None,
) -> Float[np.ndarray, "1 d"]:
    """Looks a user up in a table, or encodes a profile with the encoder of the adapter's training.

    Args:
      adapter: the adapter's file, for messages.
      about: its metadata (`interop.adapter_file.read_metadata`).
      profile: a profile, or its JSON (`--profile`). Give this or `user`.
      user: id of a user in the table (`--user`).
      table: embedding table, or its file (`--table`). A profile needs it only for the scale of a standardised table.

    Returns:
      One row in float32, of the adapter's user_dim.

    Raises:
      PSAError: neither or both of profile and user, a table, encoder or scale other than the adapter was trained with,
        or bans of the user's own that the adapter is not sure to act on.
    """
    if (not profile) == (not user):
        raise PSAError("an adapter needs a user: give either --profile JSON or --user ID with --table FILE")
    known = EmbeddingTable.load(table) if isinstance(table, Path) else table
    trained = about.get("encoder_fingerprint")
    if known is not None and trained not in (None, *known.fingerprints):
        where = table if isinstance(table, Path) else "the table"
        raise PSAError(
            f"{where}: encoded by {known.encoder} ({known.fingerprint}), the adapter was trained with "
            f"{about['encoder']} ({trained}); give the table of its training, or encode the users with that encoder"
        )
    if known is not None and about.get("standardised", known.mean is not None) != (known.mean is not None):
        raise PSAError(f"{adapter}: only one of adapter and table is standardised; give the table of its training")
    if user:
        if known is None:
            raise PSAError("--user needs --table FILE, the embeddings of known users")
        check_table_with_own_bans(adapter, about, known)
        return known.lookup([user])
    if trained is None:
        raise PSAError(f"{adapter}: does not say which encoder it was trained with; give a user's id and a table")
    if about["encoder"] not in ENCODERS or ENCODERS[about["encoder"]].model is not None:
        made = f" (psa-jax encode users.csv --encoder={about['encoder']} --model=DIR --out=FILE)"
        raise PSAError(
            f"{adapter}: trained with the encoder {about['encoder']!r}, which --profile cannot run; give --user ID "
            f"with --table FILE, a table of that encoder{made if about['encoder'] in ENCODERS else ''}"
        )
    encoder = get_encoder(about["encoder"])
    if encoder.fingerprint != trained:
        raise PSAError(
            f"{adapter}: trained with another version of the encoder {about['encoder']!r} ({trained}); give --user ID "
            "with --table FILE, the table that it was trained with"
        )
    if about.get("standardised") and known is None:
        raise PSAError(f"{adapter}: trained on a standardised table; give it with --table to scale --profile alike")
    user_profile = UserProfile.from_json(profile) if isinstance(profile, str) else profile
    raw = encoder.encode([user_profile])
    embedding = raw if known is None else known.apply(raw)
    check_own_bans(adapter, about, embedding, user_profile.bans)
    return embedding
