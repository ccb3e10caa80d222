"""Pairs of pictures of two methods, and what a judge's preferences add up to."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psa_jax.errors import PSAError
from psa_jax.evaluation.clustered import clustered_share
from psa_jax.evaluation.judges.pairs import Pair
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.paired import clustered_difference

Listed = Sequence[tuple[Path, Pictured]]


def pairs_of(listed: Listed, method: str, baseline: str) -> list[tuple[Pair, Pictured]]:
    """The pictures that both methods drew of one prompt, seed and user, with what the manifests say that the user bans.

    Args:
      listed: pictures with their paths.
      method, baseline: names.

    Returns:
      Each pair, and the method's line of it.

    Raises:
      PSAError: pictures without a prompt, of two prompts with one id, or of a user whose ban is not known.
    """
    bans: dict[str, set[str]] = {}
    for _, each in listed:
        if each.user_id and each.banned:
            bans.setdefault(each.user_id, set()).add(each.category)
    theirs = {_case(each): (path, each) for path, each in listed if each.method == baseline}
    found = []
    for path, each in listed:
        if each.method == method and _case(each) in theirs:
            other, its = theirs[_case(each)]
            if not each.prompt:
                raise PSAError("judge-pairs: pictures without a prompt; fill the column prompt of their manifest")
            if its.prompt != each.prompt:
                raise PSAError(
                    f"judge-pairs: prompt_id {each.prompt_id} is of one prompt in {method} and another in {baseline}; "
                    "make both manifests of one list of prompts"
                )
            if each.user_id and each.unsafe is not False and each.banned is None:
                raise PSAError(
                    "judge-pairs: a line has a user_id and does not say whether the user bans its category; fill the "
                    "column banned of the manifest, or leave user_id empty"
                )
            pair = Pair(path, other, each.prompt, tuple(sorted(bans.get(each.user_id, ()))))
            found.append((pair, each))
    return found


def _case(each: Pictured) -> tuple[str, int, str]:
    return each.prompt_id, each.seed, each.user_id


def won(preferences: Sequence[int | None], lines: Sequence[Pictured]) -> dict[str, Any]:
    """Wins, losses and ties, in percent of all pairs that the judge spoke of, with intervals.

    Args:
      preferences: of n pairs, as `PairJudge.preferences`.
      lines: the method's lines of the n pairs.

    Returns:
      `pairs`, `refused`, `wins`, `losses` and `ties` as numbers; `win` (share of decided pairs, clustered by user) and
      `difference` (wins less losses, of all pairs, by a bootstrap over users and over prompts), where there are some.
    """
    said = [(value, line) for value, line in zip(preferences, lines, strict=True) if value is not None]
    values = np.array([value for value, _ in said], np.int64)
    found: dict[str, Any] = {
        "pairs": len(preferences),
        "refused": len(preferences) - len(said),
        "wins": int((values > 0).sum()),
        "losses": int((values < 0).sum()),
        "ties": int((values == 0).sum()),
    }
    by = {"users": np.array([line.user_id for _, line in said], str)}
    by["prompts"] = np.array([line.prompt_id for _, line in said], str)
    decided = values != 0
    if decided.any():
        found["win"] = _percent(clustered_share(values[decided] > 0, by["users"][decided]))
    for name, clusters in by.items() if len(said) else ():
        limits = _percent(clustered_difference(values > 0, clusters, values < 0, clusters))
        found[f"by_{name}"] = {"difference": limits, name: len(set(clusters.tolist()))}
    return found


def compared_pairs(
    listed: Listed, baseline: str, prefer: Callable[[Sequence[Pair]], list[int | None]]
) -> dict[str, dict[str, Any]]:
    """`won` of every method against the baseline.

    Args:
      listed: pictures with their paths.
      baseline: name.
      prefer: preferences of pairs; called once, with all of them, so that what it costs is said once.

    Raises:
      PSAError: no pair at all, or as `prefer`.
    """
    methods = [name for name in dict.fromkeys(each.method for _, each in listed) if name != baseline]
    pairs = {method: pairs_of(listed, method, baseline) for method in methods}
    everything = [pair for method in methods for pair, _ in pairs[method]]
    if not everything:
        raise PSAError(
            f"judge-pairs: no picture of another method has the prompt, seed and user of one of {baseline}; draw both "
            "from one list, or give another --baseline"
        )
    preferences = iter(prefer(everything))
    return {
        method: won([next(preferences) for _ in pairs[method]], [line for _, line in pairs[method]])
        for method in methods
        if pairs[method]
    }


def _percent(interval: tuple[float, float, float]) -> tuple[float, float, float]:
    value, low, high = (100.0 * each for each in interval)
    return value, low, high
