"""The table of methods: configurations, results that are kept, and rates over seeds."""

import json

import numpy as np
import pytest
from support.comparison_runs import CASES, DPO, EDIT, SWAP
from support.comparison_runs import result as drawn

from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import rates
from psa_jax.mini.comparison import (
    ADAPTERS,
    OBJECTIVES,
    Method,
    config_of,
    markdown_table,
    parse_method,
    pooled_rates,
    read_result,
    write_result,
)
from psa_jax.training.settings import validate


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_method_is_a_valid_configuration(adapter: str, objective: str, tmp_path):
    config = config_of(Method(adapter, objective, 300), 2, SWAP, DPO)
    validate(config, "demo", tmp_path)
    assert (config.seed, config.steps) == (2, 300)
    assert (config.objective.loss == "none") == (objective == "swap")
    assert (config.objective.swap_weight > 0) == (objective != "dpo")
    assert (config.objective.sft_weight > 0) == (objective != "swap")
    assert SWAP.seed == 0  # the given configurations are unchanged


def test_a_base_of_preference_learning_is_refused():
    with pytest.raises(PSAError, match="objective.loss is sigmoid in the configuration, and a method sets its own"):
        config_of(EDIT, 0, DPO, DPO)


def test_the_default_is_one_of_the_methods():
    """The row of the table that `psa-jax demo` trains."""
    config = config_of(Method("edit_categories", "swap", SWAP.steps), SWAP.seed, SWAP, DPO)
    assert config.to_dict() == SWAP.to_dict()


def test_a_result_is_read_back(tmp_path):
    result = drawn(1)
    config = config_of(result.method, 1, SWAP, DPO)
    assert read_result(tmp_path, config, {"usual": CASES}) is None
    write_result(tmp_path, result, config, {"usual": CASES})
    found = read_result(tmp_path, config, {"usual": CASES})
    assert found.method == result.method
    assert (found.seed, found.swap_learnt, found.seconds) == (1, result.swap_learnt, 12.5)
    for name in ("has_content", "clean", "faithful"):
        np.testing.assert_array_equal(getattr(found.verdicts["usual"], name), getattr(result.verdicts["usual"], name))


def test_a_result_of_something_else_is_refused(tmp_path):
    result = drawn(1)
    config = config_of(result.method, 1, SWAP, DPO)
    write_result(tmp_path, result, config, {"usual": CASES})
    for other, cases in ((config_of(result.method, 2, SWAP, DPO), CASES), (config, CASES[1:])):
        with pytest.raises(PSAError, match="another configuration"):
            read_result(tmp_path, other, {"usual": cases})


def test_profiles_and_users_are_not_in_the_file(tmp_path):
    result = drawn(1)
    write_result(tmp_path, result, config_of(result.method, 1, SWAP, DPO), {"usual": CASES})
    found = json.loads((tmp_path / "verdicts.json").read_text())
    assert set(found) == {"method", "seed", "swap_learnt", "seconds", "recipe", "cases", "verdicts"}
    assert len(found["cases"]["usual"]) == 64  # a hash


def test_pooled_rates_are_the_mean_over_seeds():
    """Every seed has the same cases, so rates of banned or allowed prompts are means; clean has its own denominator."""
    results = [drawn(seed) for seed in range(3)]
    each = [rates(result.verdicts["usual"], CASES) for result in results]
    pooled = pooled_rates(results, "usual", CASES)
    for name in ("suppression", "retention", "selectivity", "benign_fidelity"):
        assert pooled[name][0] == pytest.approx(np.mean([rate[name] for rate in each]))
        assert pooled[name][1] < pooled[name][0] < pooled[name][2]


def test_the_table_has_a_row_for_each_method():
    other = Method("text", "dpo", 540)
    table = markdown_table([drawn(0), drawn(0, other), drawn(1)], "usual", CASES).splitlines()
    assert len(table) == 4
    assert table[2].startswith("| edit | swap | 540 | 2 |") and table[2].endswith("| 0.91 |")
    assert table[3].startswith("| text | dpo | 540 | 1 |")
    assert table[0].count("|") == table[1].count("|") == table[2].count("|")


@pytest.mark.parametrize("text", ["edit", "edit-", "edit_swap", "unknown-swap", "edit-unknown"])
def test_an_unknown_method_is_refused(text: str):
    with pytest.raises(PSAError, match="write ADAPTER-OBJECTIVE, such as edit-swap"):
        parse_method(text, 540)
