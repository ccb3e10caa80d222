"""The tables of `psa-jax evaluate limits` in Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

from psa_jax.evaluation.read_back import ATTACKERS
from psa_jax.mini.comparison import rate_cell
from psa_jax.mini.limits import RATES, VARIATIONS

_READ = {
    "embedding": "the embedding",
    "gates": "the seven gate numbers",
    "bits": "their bits",
}
"""What an attribute is read back from, as `limits.read_attributes` calls it → its column."""


def limits_page(report: Mapping[str, Any]) -> str:
    """The tables of a report: one for each variation, what is read back, and how it was made.

    Args:
      report: as `psa-jax evaluate limits` writes it to limits.json.
    """
    lines = ["# Where the adapter fails", ""]
    lines += ["Percent with 95 % intervals, clustered by user. Rates are against the user's own bans.", ""]
    for name, values in report["variations"].items():
        lines += [*_table(VARIATIONS[name].about, values), ""]
    if "strictness" in report:
        found = report["strictness"]
        lines += [
            f"From an adult without bans to the user: the share of banned prompts whose content is gone "
            f"{'never falls' if found['monotone'] else 'falls at a step'}; content that was gone comes back for "
            f"{rate_cell(found['flip_back'])} % of the prompts.",
            "",
        ]
    lines += [*_read_back(report["read_back"]), "", *_about(report)]
    return "\n".join(lines) + "\n"


def _table(about: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield f"| {about} | {' | '.join(RATES)} | banned, allowed, users |"
    yield "|---" * (2 + len(RATES)) + "|"
    for value, found in values.items():
        yield _row(value, found["rates"])
        if "claimed" in found:
            yield _row("… against the claimed user's bans", found["claimed"])


def _row(name: str, rates: Mapping[str, Any]) -> str:
    counts = ", ".join(str(rates[each]) for each in ("banned", "allowed", "users"))
    return f"| {name} | {' | '.join(rate_cell(rates[rate]) for rate in RATES)} | {counts} |"


def _read_back(found: Mapping[str, Any]) -> Iterator[str]:
    kinds = [kind for kind in _READ if kind in next(iter(found.values()))]
    yield f"| read back | by | {' | '.join(_READ[kind] for kind in kinds)} | guessing | users |"
    yield "|---" * (4 + len(kinds)) + "|"
    for attribute, shares in found.items():
        for by, words in ATTACKERS.items():
            cells = [rate_cell(shares[kind][by]) for kind in kinds] + [rate_cell(shares["guess"])]
            yield f"| {attribute.replace('_', ' ')} | {words} | {' | '.join(cells)} | {shares['users']} |"


def _about(report: Mapping[str, Any]) -> Iterator[str]:
    adapter, sampling = report["adapter"], report["sampling"]
    yield f"- adapter: {adapter['kind']}, sha256 {adapter['sha256']}"
    yield f"- sampling: {', '.join(f'{name} {value}' for name, value in sampling.items())}"
    yield f"- seed: {report['seed']}"
    yield f"- versions: {', '.join(f'{name} {value}' for name, value in report['versions'].items())}"
    yield f"- {report['seconds']:.0f} s: `{report['command']}`"
