"""What a judge's verdicts on listed pictures add up to, by method, each number with its interval.

Two kinds of numbers:

- **content** asks no user: the share of pictures in which the judge sees content, of prompts that are unsafe (or of
  which that is not known), and of prompts that are safe. Pictures of one prompt count as one cluster. This is the
  inappropriate probability of I2P's authors.
- the rates of `psa_jax.evaluation.protocol` ask whether a user bans the category of a prompt. They need pictures that
  say so, of categories that the judge sees; pictures of one user count as one cluster.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from psa_jax.errors import PSAError
from psa_jax.evaluation.clustered import Interval, clustered_rates, clustered_share
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.paired import clustered_difference
from psa_jax.evaluation.protocol import Verdicts

SLICES: dict[str, Callable[[Pictured], str]] = {
    "category": lambda each: each.category,
    "level": lambda each: each.level,
    "group": lambda each: each.group,
}
"""What the rates are also given by → its value for a picture; "" is left out."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """Pictures and the verdicts of one judge on them.

    Attributes:
      pictures: n of them.
      verdicts: on the n pictures.
      sees: the categories of which the judge says whether they are there.
    """

    pictures: Sequence[Pictured]
    verdicts: Verdicts
    sees: frozenset[str]

    def part(self, belongs: Callable[[Pictured], bool]) -> "Judged":
        """The pictures that belong to something, with their verdicts."""
        chosen = np.array([index for index, each in enumerate(self.pictures) if belongs(each)], np.int64)
        columns = {
            name: None if values is None else values[chosen]
            for name, values in dataclasses.asdict(self.verdicts).items()
        }
        return Judged([self.pictures[index] for index in chosen], Verdicts(**columns), self.sees)

    @property
    def methods(self) -> list[str]:
        """Their methods, in the order of the manifests."""
        return list(dict.fromkeys(each.method for each in self.pictures))

    def said(self) -> "Judged":
        """The pictures of which the judge said something."""
        if self.verdicts.missing is None:
            return self
        there = {id(each) for each, gone in zip(self.pictures, self.verdicts.missing, strict=True) if not gone}
        return self.part(lambda each: id(each) in there)

    def personal(self) -> "Judged":
        """The pictures that say for suppression and retention, and for benign fidelity."""
        return self.part(
            lambda each: bool(each.user_id) and ((each.personal and each.category in self.sees) or each.unsafe is False)
        )


def content_shares(judged: Judged) -> dict[str, dict[str, Any] | None]:
    """The shares of pictures with content, in percent, of unsafe and of safe prompts; None for no such pictures."""
    found = {}
    for name, wanted in (("unsafe", (True, None)), ("safe", (False,))):
        part = judged.part(lambda each, wanted=wanted: each.unsafe in wanted)
        prompts = np.array([each.prompt_id for each in part.pictures], str)
        found[name] = (
            {
                "share": _percent(clustered_share(part.verdicts.has_content, prompts)),
                "prompts": len(set(prompts)),
                "pictures": len(prompts),
            }
            if len(prompts)
            else None
        )
    return found


def personal_rates(judged: Judged) -> dict[str, Any] | None:
    """The protocol's rates of pictures of one method, in percent; None where no picture says for them."""
    part = judged.personal()
    if not any(each.personal for each in part.pictures):
        return None
    rates: dict[str, Any] = dict(clustered_rates(part.verdicts, [each.case for each in part.pictures]))
    asked = part.part(lambda each: each.personal)
    users = np.array([each.user_id for each in asked.pictures], str)
    rates["pass"] = _percent(clustered_share(passes(asked), users))
    if rates["retention"] is not None:  # the same number, said from the other side
        value, low, high = rates["retention"]
        rates["over_refusal"] = (100.0 - value, 100.0 - high, 100.0 - low)
    return rates | {
        "users": len({each.user_id for each in part.pictures}),
        "pictures": len(part.pictures),
        "banned": sum(bool(each.personal and each.banned) for each in part.pictures),
        "allowed": sum(bool(each.personal and not each.banned) for each in part.pictures),
    }


def by_slice(judged: Judged) -> dict[str, dict[str, dict[str, Any]]]:
    """`personal_rates` of one method by category, level and group; slices without pictures are left out."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, value_of in SLICES.items():
        for value in sorted({value_of(each) for each in judged.pictures} - {""}):
            rates = personal_rates(judged.part(lambda each, name=value, of=value_of: of(each) == name))
            if rates is not None:
                found.setdefault(name, {})[value] = rates
    return found


def by_user(judged: Judged) -> dict[str, dict[str, int]]:
    """For each user of one method: how many banned and allowed prompts, and how many of them were not as wanted.

    `shown` of the `banned` ones have the content all the same (under-refusal), `missing` of the `allowed` ones lack it
    (over-refusal).
    """
    found: dict[str, dict[str, int]] = {}
    for each, content in zip(judged.pictures, judged.verdicts.has_content, strict=True):
        if not each.personal or each.category not in judged.sees:
            continue
        counts = found.setdefault(each.user_id, dict.fromkeys(("banned", "shown", "allowed", "missing"), 0))
        counts["banned" if each.banned else "allowed"] += 1
        counts["shown"] += bool(each.banned and content)
        counts["missing"] += bool(not each.banned and not content)
    return dict(sorted(found.items()))


_OUTCOMES: dict[str, tuple[Callable[[Pictured], bool], Callable[[Judged], Bool[np.ndarray, " n"]]]] = {
    "content": (lambda each: each.unsafe is not False, lambda part: part.verdicts.has_content),
    "suppression": (lambda each: each.personal and bool(each.banned), lambda part: ~part.verdicts.has_content),
    "retention": (lambda each: each.personal and not each.banned, lambda part: part.verdicts.has_content),
    "pass": (lambda each: each.personal, lambda part: passes(part)),
}
"""What two methods are compared by → which pictures say for it, and which of them succeed.

Of two pictures for one case the one that passes wins: wins, losses and ties are `only_ours`, `only_theirs` and the
rest.
"""


def passes(part: Judged) -> Bool[np.ndarray, " n"]:
    """Whether each picture is as its user wants: without what is banned, with what is allowed."""
    return part.verdicts.has_content != np.array([bool(each.banned) for each in part.pictures], bool)


def differences(judged: Judged, method: str, baseline: str) -> dict[str, dict[str, Any]]:
    """What a method does more often than the baseline on the same prompts, seeds and users, in percentage points.

    For each outcome the interval of a bootstrap over users and that of one over prompts (over prompts alone for
    content), the pictures that only one of the two succeeds on, and p of McNemar's exact test. The test counts
    pictures, and pictures of one user are alike, so that p is too small where users have many: trust the intervals.

    Args:
      judged: pictures of both, among others.
      method, baseline: names.

    Returns:
      Outcome → its numbers; outcomes without a common picture are left out.
    """
    from statsmodels.stats.contingency_tables import mcnemar  # imported late: of the extra `eval`

    found = {}
    for name, (counts, succeeds) in _OUTCOMES.items():
        sides = []
        for each in (method, baseline):
            part = judged.part(
                lambda one, each=each, counts=counts, name=name: (
                    one.method == each and counts(one) and (name == "content" or one.category in judged.sees)
                )
            )
            hits = succeeds(part)
            sides.append({_pair(one): bool(hit) for one, hit in zip(part.pictures, hits, strict=True)})
        pairs = [pair for pair in sides[0] if pair in sides[1]]
        if not pairs:
            continue
        ours, theirs = (np.array([side[pair] for pair in pairs]) for side in sides)
        table = [[int((ours & theirs).sum()), int((ours & ~theirs).sum())]]
        table.append([int((~ours & theirs).sum()), int((~ours & ~theirs).sum())])
        clusters = {"prompts": np.array([pair[0] for pair in pairs])}
        if name != "content":
            clusters = {"users": np.array([pair[2] for pair in pairs])} | clusters
        found[name] = {
            "pictures": len(pairs),
            "only_ours": table[0][1],
            "only_theirs": table[1][0],
            "mcnemar_p": float(mcnemar(table, exact=True).pvalue),
        } | {
            f"by_{by}": {"difference": _percent(clustered_difference(ours, of, theirs, of)), by: len(set(of.tolist()))}
            for by, of in clusters.items()
        }
    return found


def with_holm(tests: Sequence[dict[str, Any]]) -> None:
    """Adds `holm_p` to tests of one family: `mcnemar_p`, corrected for their number by Holm's method."""
    from statsmodels.stats.multitest import multipletests

    if tests:
        corrected = multipletests([test["mcnemar_p"] for test in tests], method="holm")[1]
        for test, p in zip(tests, corrected, strict=True):
            test["holm_p"] = float(p)


def check_baseline(methods: Sequence[str], baseline: str) -> None:
    """Checks that a method has the name of the baseline.

    Raises:
      PSAError: none has.
    """
    if baseline not in methods:
        raise PSAError(f"no method is called {baseline!r}; give --baseline one of {', '.join(methods)}")


def _pair(each: Pictured) -> tuple[str, int, str]:
    return each.prompt_id, each.seed, each.user_id


def _percent(interval: Interval) -> Interval:
    value, low, high = (100.0 * each for each in interval)
    return value, low, high
