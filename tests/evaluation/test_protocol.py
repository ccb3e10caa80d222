"""Rates, wins and the choice of cases, against numbers worked by hand."""

import numpy as np
import pytest

from psa_jax.data.sage import read_split
from psa_jax.evaluation.protocol import Case, Verdicts, rates, select_cases, wins
from psa_jax.mini.dataset import render_mini
from psa_jax.mini.protocol import case_of

# Four banned, two allowed, two safe.
CASES = [
    *(Case(f"000000{i}", f"prompt {i}", "Hate", True, True) for i in range(4)),
    *(Case(f"000000{i}", f"prompt {i}", "Violence", True, False) for i in range(4, 6)),
    *(Case(f"000000{i}", f"prompt {i}", "Hate", False, True) for i in range(6, 8)),
]


def verdicts(content: str, clean: str, faithful: str) -> Verdicts:
    return Verdicts(*(np.array([c == "1" for c in text]) for text in (content, clean, faithful)))


OURS = verdicts("10001000", "01100111", "00000010")
BASE = verdicts("11111100", "00000011", "00000011")


def test_rates_by_hand():
    assert rates(OURS, CASES) == {
        "suppression": 75.0,  # 3 of 4
        "retention": 50.0,  # 1 of 2
        "selectivity": 25.0,
        "clean": pytest.approx(200 / 3),  # 2 of the 3 suppressed
        "benign_fidelity": 50.0,
        "pass_rate": pytest.approx(400 / 6),
        "n": 8,
        "n_banned": 4,
        "n_allowed": 2,
        "n_safe": 2,
    }


def test_a_model_that_shows_everything_has_selectivity_0():
    assert rates(BASE, CASES)["selectivity"] == 0.0
    assert rates(verdicts("0" * 8, "1" * 8, "0" * 8), CASES)["selectivity"] == 0.0


def test_wins_by_hand():
    # Passes of ours: 0 1 1 1 | 1 0; of the base model: 0 0 0 0 | 1 1. Decided: 4 of 6, ours wins 3.
    assert wins(OURS, BASE, CASES) == (75.0, pytest.approx(200 / 6))
    assert wins(BASE, OURS, CASES) == (25.0, pytest.approx(200 / 6))
    assert wins(BASE, BASE, CASES) == (0.0, 100.0)


def test_a_seed_belongs_to_the_prompt():
    assert CASES[0].seed == Case("0000009", "prompt 0", "Violence", True, False).seed
    assert len({case.seed for case in CASES}) == len(CASES)
    assert all(0 <= case.seed < 2**31 for case in CASES)


def test_cases_are_balanced_over_categories(tmp_path):
    render_mini(tmp_path / "sage", 40, 3)
    every = [case_of(record) for record in read_split(tmp_path / "sage", "train")]
    cases = select_cases(every, 21, seed=0)
    assert cases == select_cases(every, 21, seed=0)
    assert cases != select_cases(every, 21, seed=1)
    for unsafe, banned in ((True, True), (True, False)):
        group = [case for case in cases if case.unsafe == unsafe and case.banned == banned]
        assert len(group) == 21
        assert {
            category: sum(case.category == category for case in group) for category in {c.category for c in group}
        } == (dict.fromkeys(("Harassment", "Hate", "Propaganda", "Self-Harm", "Sexuality", "Shocking", "Violence"), 3))
    assert sum(not case.unsafe for case in cases) == 10
