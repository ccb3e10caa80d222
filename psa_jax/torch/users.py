"""Users of a call: ids, embeddings, profiles, or what they ban; checked, as tensors on the CPU."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psa_jax.errors import PSAError
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.schema import CATEGORIES, UserProfile
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.profiles.user_embedding import user_embedding

Users = str | Sequence[str] | np.ndarray | Tensor
"""Users: an id, several ids, or embeddings [D] or [n, D]."""
Profiles = Mapping[str, Any] | UserProfile | Sequence[Mapping[str, Any] | UserProfile]
"""A profile, such as `{"age": 9, "gender": "female"}` (`UserProfile.from_mapping`), or several."""
Gates = dict[str, float] | Sequence[float] | np.ndarray | Tensor
"""What users ban, from 0 to 1 for each category: a dict by category, or [7] or [n, 7]."""


def embeddings_of(user: Users, config: AdapterConfig, table: EmbeddingTable | None) -> Tensor:
    """User embeddings [n, D] in float32.

    Args:
      user: ids or embeddings.
      config: of the adapter.
      table: of known users, for ids.

    Raises:
      PSAError: what is no user, an unknown id, or an embedding that does not fit or is not finite.
    """
    if isinstance(user, str):
        user = [user]
    if isinstance(user, np.ndarray) and user.dtype.kind in "UO":
        user = user.ravel().tolist()
    if isinstance(user, np.ndarray):
        numbers = user.dtype.kind == "f"
    else:
        numbers = isinstance(user, Tensor) and user.is_floating_point() and user.layout is torch.strided
    if not numbers:
        # A list or tuple: a set or a dict has no order that matches the prompts.
        if not isinstance(user, (list, tuple)) or not user or not all(isinstance(one, str) for one in user):
            raise PSAError("user must be a list of ids, or embeddings as one array or tensor [n, D] of floats")
        if table is None:
            raise PSAError("users by id need load_psa(..., table=FILE)")
        user = table.lookup(user)
    users = torch.as_tensor(user).detach().to("cpu", torch.float32)
    users = users[None] if users.ndim == 1 else users
    if users.ndim != 2 or users.shape[1] != config.user_dim or not len(users):
        raise PSAError(f"user embeddings have shape {tuple(users.shape)}, the adapter needs [n, {config.user_dim}]")
    if not torch.isfinite(users).all():
        raise PSAError("a user embedding has NaN or infinity; encode the user again")
    return users


def profiles_encoded(
    profile: Profiles, adapter: Path, about: Mapping[str, Any], table: EmbeddingTable | None
) -> np.ndarray:
    """Embeddings [n, D] of profiles, by the encoder of the adapter's training.

    Args:
      profile: one or several.
      adapter: the adapter's file, for messages.
      about: its metadata.
      table: of its training, where that was standardised.

    Raises:
      PSAError: what is no profile, or an encoder that cannot run here.
    """
    each = list(profile) if isinstance(profile, (list, tuple)) else [profile]
    if not each:
        raise PSAError("profile is an empty list; give a profile, or one for each prompt")
    found = [one if isinstance(one, UserProfile) else UserProfile.from_mapping(one) for one in each]
    return np.concatenate([user_embedding(adapter, about, profile=one, user=None, table=table) for one in found])


def bans_of(gates: Gates, config: AdapterConfig) -> Tensor:
    """What users ban [n, 7] in float32.

    Args:
      gates: numbers from 0 to 1.
      config: of the adapter.

    Raises:
      PSAError: an adapter without the gate by categories, or what are not seven numbers from 0 to 1 for each user.
    """
    if not config.by_categories:
        raise PSAError("gates=... needs an adapter with the gate by categories; this one takes user=...")
    if isinstance(gates, dict):
        if gates.keys() != set(CATEGORIES):
            raise PSAError(f"gates must have a number for each of {', '.join(CATEGORIES)}, and no other key")
        gates = [gates[name] for name in CATEGORIES]
    try:
        bans = torch.as_tensor(gates).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PSAError(f"gates must be numbers from 0 to 1, {len(CATEGORIES)} for each user") from error
    bans = bans[None] if bans.ndim == 1 else bans
    if bans.ndim != 2 or bans.shape[1] != len(CATEGORIES) or not len(bans):
        raise PSAError(f"gates have shape {tuple(bans.shape)}; give [n, {len(CATEGORIES)}]")
    if not ((bans >= 0) & (bans <= 1)).all():  # NaN is neither
        raise PSAError("gates must be numbers from 0 to 1; one is outside or NaN")
    return bans


def scales_of(scale: float | Sequence[float] | Tensor) -> Tensor:
    """Strengths [1 or prompts] in float32.

    Raises:
      PSAError: other values than finite numbers.
    """
    try:
        scales = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PSAError("scale must be a number, or one for each prompt") from error
    if not torch.isfinite(scales).all():
        raise PSAError("scale must be finite numbers")
    return scales
