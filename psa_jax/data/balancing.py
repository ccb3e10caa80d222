"""Balancing: the order in which rows are trained on, and which user a prompt is combined with.

If a category alone told which picture is preferred, training would not look at the user. Two ways avoid this: `"users"`
combines every unsafe prompt with sampled users, half of whom ban its category; `"rows"` keeps every row's user and
repeats rows until bans and permissions occur equally often.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from psa_jax.data.rows import NO_CATEGORY
from psa_jax.data.shards import RowColumns
from psa_jax.errors import PSAError
from psa_jax.profiles.schema import CATEGORIES

BALANCES = ("users", "rows", "none")
"""Ways of balancing."""


def row_order(columns: RowColumns, balance: str, safe_share: float, seed: int) -> Int[np.ndarray, " m"]:
    """Row numbers of one epoch, some repeated, before shuffling.

    Args:
      columns: facts about all n rows.
      balance: "users" (`mixed_order`), "rows" (`balanced_order`) or "none" (every row once).
      safe_share: share of safe prompts in all rows, in [0, 1); not for "none".
      seed: of the random choices.

    Raises:
      PSAError: an unknown way, or data that cannot be balanced.
    """
    if balance == "users":
        return mixed_order(columns.unsafe, safe_share, seed)
    if balance == "rows":
        return balanced_order(columns.categories, columns.unsafe, columns.banned, safe_share, seed)
    if balance == "none":
        return np.arange(len(columns.categories))
    raise PSAError(f"balance is {balance!r}; use one of {', '.join(BALANCES)}")


def balanced_order(
    categories: Int[np.ndarray, " n"],
    unsafe: Bool[np.ndarray, " n"],
    banned: Bool[np.ndarray, " n"],
    safe_share: float = 0.3,
    seed: int = 0,
) -> Int[np.ndarray, " m"]:
    """Row numbers in which, for every category, banned and allowed unsafe prompts occur equally often (`"rows"`).

    The rarer of the two is repeated. Safe prompts then make up `safe_share` of all rows (rounded to whole rows). No row
    is lost: if that share has no place for every safe row, all unsafe rows are repeated until it has. Within one group
    the numbers of repetitions differ by at most one. With safe_share = 0 there are no safe rows.

    Args:
      categories: category number of each row.
      unsafe: True for an unsafe prompt.
      banned: whether the row's user bans the category.
      safe_share: in [0, 1).
      seed: decides which rows get the extra repetition, and the order.

    Raises:
      PSAError: a category that all users ban or all allow; no safe rows; a bad share.
    """
    rng = np.random.default_rng(seed)
    groups: list[tuple[np.ndarray, int]] = []
    for category in np.unique(categories[unsafe]).tolist():
        here = unsafe & (categories == category)
        bans, allows = np.flatnonzero(here & banned), np.flatnonzero(here & ~banned)
        _require_both(category, bans, allows)
        larger = max(bans.size, allows.size)
        groups += [(bans, larger), (allows, larger)]
    return _with_safe(groups, np.flatnonzero(~unsafe), safe_share, rng)


def mixed_order(unsafe: Bool[np.ndarray, " n"], safe_share: float = 0.3, seed: int = 0) -> Int[np.ndarray, " m"]:
    """Row numbers, some repeated, of which `safe_share` have safe prompts (`"users"`); no row is lost.

    Args:
      unsafe: True for an unsafe prompt.
      safe_share: in [0, 1).
      seed: decides which rows get the extra repetition, and the order.

    Raises:
      PSAError: no unsafe or no safe rows, or a bad share.
    """
    rows = np.flatnonzero(unsafe)
    return _with_safe([(rows, rows.size)], np.flatnonzero(~unsafe), safe_share, np.random.default_rng(seed))


def _with_safe(
    groups: list[tuple[np.ndarray, int]], safe: np.ndarray, safe_share: float, rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """Groups of unsafe rows, each stretched to its number of places, with safe rows for their share of all."""
    if not 0 <= safe_share < 1:
        raise PSAError(f"share of safe prompts is {safe_share}; give a number from 0 to below 1")
    unsafe = sum(count for _, count in groups)
    if not unsafe:
        raise PSAError("cannot balance: there are no rows with unsafe prompts; set data.balance to none")
    ratio = safe_share / (1 - safe_share)  # safe rows for each unsafe one
    if safe_share:
        if not safe.size:
            raise PSAError("cannot balance: there are no rows with safe prompts; set data.safe_share to 0")
        copies = max(1, int(np.ceil(safe.size / (unsafe * ratio))))
        groups = [(rows, count * copies) for rows, count in groups]
        groups.append((safe, round(unsafe * copies * ratio)))
    return rng.permutation(np.concatenate([_stretch(rows, count, rng) for rows, count in groups]))


def _stretch(rows: Int[np.ndarray, " n"], count: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """Repeats rows to `count`; the numbers of repetitions differ by at most one."""
    times, extra = divmod(count, rows.size)
    return np.concatenate([np.tile(rows, times), rng.choice(rows, extra, replace=False)])


@dataclass(frozen=True, eq=False)
class UserSampler:
    """Samples a user for a row: one who bans the row's category, or one who allows it.

    Args:
      users: category → (indices of the users who allow it, indices of those who ban it). Users are numbered in the
        order of their ids.
      columns: facts about the rows.
      banned_share: how often the user is one who bans the category.
    """

    users: Mapping[int, tuple[np.ndarray, np.ndarray]]
    columns: RowColumns
    banned_share: float = 0.5

    @classmethod
    def of(cls, columns: RowColumns, banned_share: float = 0.5) -> "UserSampler":
        """The sampler over the users of a split.

        Raises:
          PSAError: a category that all users ban or all allow, or unsafe prompts without a category.
        """
        if (columns.categories[columns.unsafe] == NO_CATEGORY).any():
            raise PSAError(
                "cannot balance: who bans a prompt without a category is known of its own user alone; set data.balance "
                "to rows or none"
            )
        numbers = np.unique(np.asarray(columns.user_ids), return_inverse=True)[1]
        users = {}
        for category in np.unique(columns.categories[columns.unsafe]).tolist():
            here = columns.categories == category
            allow, ban = (np.unique(numbers[here & (columns.banned == banned)]) for banned in (False, True))
            _require_both(category, ban, allow)
            users[category] = allow, ban
        return cls(users, columns, banned_share)

    def sample(self, row: int, rng: np.random.Generator) -> tuple[int, bool]:
        """Samples the user for a row.

        Args:
          row: its number.
          rng: the source of randomness.

        Returns:
          The index of the user, and whether that user bans the row's category.
        """
        banned = bool(rng.integers(2)) if self.banned_share == 0.5 else bool(rng.random() < self.banned_share)
        return int(rng.choice(self.users[int(self.columns.categories[row])][banned])), banned


def _require_both(category: int, bans: np.ndarray, allows: np.ndarray) -> None:
    if not bans.size or not allows.size:
        who = "bans" if not bans.size else "allows"
        what = "a prompt without a category" if category == NO_CATEGORY else CATEGORIES[category]
        raise PSAError(f"cannot balance: no user here {who} {what}; add users or set data.balance to none")
