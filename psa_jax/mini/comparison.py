"""Kinds of adapter and objectives beside each other, with several seeds: `psa-jax compare`.

A method is a kind, an objective and a number of steps. Each of its runs leaves its verdicts in a folder of its own; the
table is made from all the folders that are there and were judged on the same cases.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from psa_jax.errors import PSAError
from psa_jax.evaluation.clustered import Interval, clustered_rates
from psa_jax.evaluation.protocol import Case, Verdicts, joined
from psa_jax.files import write
from psa_jax.json_input import read_json
from psa_jax.mini.protocol import MiniCase, cases_hash
from psa_jax.mini.recorded import pack_verdicts, recipe_of, unpack_verdicts
from psa_jax.models.adapter_config import ADDED_SIZES

_NO_GATE = {"qk_dim": None} | ADDED_SIZES
ADAPTERS: dict[str, dict[str, Any]] = {
    "published_t1": _NO_GATE | {"kind": "published", "tokens": 1},
    "published_t4": _NO_GATE | {"kind": "published", "tokens": 4},
    "text": _NO_GATE | {"kind": "text", "tokens": 8},
    "concept": _NO_GATE | {"kind": "concept", "tokens": 8},
    "prompt": _NO_GATE | {"kind": "prompt", "tokens": 8},
    "rewrite": _NO_GATE | {"kind": "rewrite", "tokens": 8},
    "edit": _NO_GATE | {"kind": "edit", "tokens": 8},
    "edit_mixing": _NO_GATE | {"kind": "edit", "tokens": 8, "mixing": True},
    "edit_categories": _NO_GATE | {"kind": "edit", "tokens": 0, "gate": "categories"},
    "edit_categories_mixing": _NO_GATE | {"kind": "edit", "tokens": 0, "gate": "categories", "mixing": True},
}
"""Name → what `config.adapter` is set to."""

OBJECTIVES = ("dpo", "swap", "dpo_swap")
"""Diffusion-DPO with an SFT term as in `tiny:dpo`; swap distillation alone as in `tiny`; both together."""

RATES = ("suppression", "retention", "selectivity", "clean", "benign_fidelity")
"""The columns of the table."""
RESULT_FILE = "verdicts.json"
"""In the folder of a run that has ended."""


class Method(NamedTuple):
    """One row of the table: a key of ADAPTERS, one of OBJECTIVES, and the number of training steps."""

    adapter: str
    objective: str
    steps: int

    @property
    def name(self) -> str:
        """The folder of its runs."""
        return f"{self.adapter}-{self.objective}-{self.steps}"


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdicts of one run, and how much of the swap it has learnt.

    Attributes:
      method: what was trained.
      seed: of the training.
      verdicts: for each group of cases.
      swap_learnt: on held-out banned prompts, 1 − L_swap; at most 1.
      seconds: of the training.
    """

    method: Method
    seed: int
    verdicts: dict[str, Verdicts]
    swap_learnt: float
    seconds: float


def parse_method(text: str, steps: int) -> Method:
    """Reads `ADAPTER-OBJECTIVE`, as in `edit-swap`.

    Args:
      text: of the command line.
      steps: of the training.

    Raises:
      PSAError: one of the two is unknown.
    """
    adapter, _, objective = text.partition("-")
    if adapter not in ADAPTERS or objective not in OBJECTIVES:
        raise PSAError(
            f"method {text!r} is unknown; write ADAPTER-OBJECTIVE, such as edit-swap, with one of "
            f"{', '.join(ADAPTERS)} and one of {', '.join(OBJECTIVES)}"
        )
    return Method(adapter, objective, steps)


def config_of(
    method: Method, seed: int, swap: ml_collections.ConfigDict, dpo: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Makes the configuration of one run.

    Pairs are mixed as in `dpo`, where a gate that is fitted beforehand does not make allowed and safe prompts needless.

    Args:
      method, seed: of the run.
      swap, dpo: configurations like `tiny` and `tiny:dpo`. Of the first are data and evaluation; seed, adapter and
        objective are the method's.

    Raises:
      PSAError: `swap` is no configuration of swap distillation alone.
    """
    if swap.objective.loss != "none":
        raise PSAError(
            f"compare: objective.loss is {swap.objective.loss} in the configuration, and a method sets its own; give "
            "one of swap distillation alone, such as tiny"
        )
    config = swap.copy_and_resolve_references()
    alone = method.objective == "swap"
    with config.unlocked():
        config.seed, config.steps = seed, method.steps
        config.adapter.update(ADAPTERS[method.adapter])
        config.objective.update(swap.objective if alone else dpo.objective)
        if method.objective == "dpo_swap":
            config.objective.swap_weight = swap.objective.swap_weight
        if not (alone and method.adapter.startswith("edit_categories")):
            config.data.update(safe_share=dpo.data.safe_share, banned_share=dpo.data.banned_share)
    return config


def write_result(
    folder: Path, result: Result, config: ml_collections.ConfigDict, cases: Mapping[str, Sequence[MiniCase]]
) -> None:
    """Writes the result of a run, with its configuration and what it was judged on.

    Args:
      folder: of the run.
      cases: of each group.
    """
    found = {
        "method": result.method._asdict(),
        "seed": result.seed,
        "swap_learnt": result.swap_learnt,
        "seconds": result.seconds,
        "recipe": recipe_of(config),
        "cases": {name: cases_hash(group) for name, group in cases.items()},
        "verdicts": {name: pack_verdicts(each) for name, each in result.verdicts.items()},
    }
    write(folder / RESULT_FILE, json.dumps(found, indent=1) + "\n")


def read_result(
    folder: Path, config: ml_collections.ConfigDict | None, cases: Mapping[str, Sequence[MiniCase]]
) -> Result | None:
    """The result of a run; None where it has not ended.

    Args:
      folder: of the run.
      config: of the run; None to take it as it is, if it was judged on these cases (else None).
      cases: of each group.

    Raises:
      PSAError: the run had another configuration or was judged on other cases.
    """
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    found = read_json(path, hint="delete it to run it again")
    hashes = {name: cases_hash(group) for name, group in cases.items()}
    if config is None and found["cases"] != hashes:
        return None
    if config is not None and (found["recipe"] != recipe_of(config) or found["cases"] != hashes):
        raise PSAError(
            f"{path} is of another configuration, model or set of cases; give a new --workdir, or delete {folder}"
        )
    return result_of(found)


def result_of(found: Mapping[str, Any]) -> Result:
    """The result of a run from what `write_result` wrote."""
    verdicts = {name: unpack_verdicts(bits) for name, bits in found["verdicts"].items()}
    return Result(Method(**found["method"]), found["seed"], verdicts, found["swap_learnt"], found["seconds"])


def pooled_rates(results: Sequence[Result], group: str, cases: Sequence[Case]) -> dict[str, Interval | None]:
    """Rates over several seeds of one method, with intervals clustered by user.

    Args:
      results: of the seeds.
      group: of cases.
      cases: of that group.
    """
    pooled = joined([result.verdicts[group] for result in results])
    return clustered_rates(pooled, list(cases) * len(results))


def markdown_table(results: Sequence[Result], group: str, cases: Sequence[Case]) -> str:
    """The table of a group of cases, a row for each method, in the order of `results`.

    Args:
      results: of all methods and seeds.
      group: of cases.
      cases: of that group.
    """
    methods = dict.fromkeys(result.method for result in results)
    lines = [
        "| adapter | objective | steps | seeds | " + " | ".join(RATES) + " | swap_learnt |",
        "|---" * (5 + len(RATES)) + "|",
    ]
    for method in methods:
        of_method = [result for result in results if result.method == method]
        rates = pooled_rates(of_method, group, cases)
        learnt = np.mean([result.swap_learnt for result in of_method])
        cells = [method.adapter, method.objective, str(method.steps), str(len(of_method))]
        cells += [rate_cell(rates[name]) for name in RATES]
        lines.append("| " + " | ".join([*cells, f"{learnt:.2f}"]) + " |")
    return "\n".join(lines) + "\n"


def rate_cell(rate: Interval | None) -> str:
    """A rate with its interval as a cell of a table; a dash where there is none."""
    return "–" if rate is None else f"{rate[0]:.1f} ({rate[1]:.1f} to {rate[2]:.1f})"
