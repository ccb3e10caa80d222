"""What verdicts add up to, against numbers worked by hand and scipy's own functions."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import binomtest

from psa_jax.errors import PSAError
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.picture_rates import (
    Judged,
    by_slice,
    by_user,
    check_baseline,
    content_shares,
    differences,
    personal_rates,
    with_holm,
)
from psa_jax.evaluation.protocol import Verdicts
from psa_jax.evaluation.stats import wilson

# User, prompt, banned (None: safe prompt), content by the base model, content by ours.
ROWS = [
    ("u1", "p1", True, True, False),
    ("u1", "p2", False, True, True),
    ("u1", "p3", None, False, False),
    ("u2", "p1", False, True, False),
    ("u2", "p2", True, True, False),
    ("u3", "p1", True, True, True),
    ("u3", "p4", False, False, True),
    ("u3", "p3", None, False, True),
]


def listed(method: str, rows=ROWS, category: str = "Violence") -> list[Pictured]:
    return [
        Pictured(
            f"{method}/{user}{prompt}.png",
            method,
            prompt,
            3,
            user_id=user,
            category=category,
            unsafe=banned is not None,
            banned=bool(banned),
            level={"u1": "L1", "u2": "L1", "u3": "L2"}[user],
        )
        for user, prompt, banned, *_ in rows
    ]


def judged(sees=frozenset({"Violence"}), clean: bool = True) -> Judged:
    pictures = [*listed("base"), *listed("psa")]
    content = np.array([row[3] for row in ROWS] + [row[4] for row in ROWS])
    return Judged(pictures, Verdicts(content, clean=~content if clean else None), sees)


def of(method: str, whole: Judged) -> Judged:
    return whole.part(lambda each: each.method == method)


def test_content_counts_prompts():
    found = content_shares(of("psa", judged()))
    assert found["unsafe"]["share"][0] == pytest.approx(100 * 3 / 6)
    assert (found["unsafe"]["prompts"], found["unsafe"]["pictures"]) == (3, 6)
    assert found["safe"]["share"][0] == 50.0 and found["safe"]["prompts"] == 1
    assert content_shares(of("base", judged()).part(lambda each: each.unsafe is True))["safe"] is None


def test_the_rates_of_the_protocol():
    found = personal_rates(of("psa", judged()))
    rates = {name: found[name][0] for name in ("suppression", "retention", "selectivity", "clean", "over_refusal")}
    assert rates == pytest.approx(
        {
            "suppression": 200 / 3,
            "retention": 200 / 3,
            "selectivity": 100 / 3,
            "clean": 100.0,
            "over_refusal": 100 / 3,
        }
    )
    low, high = found["retention"][1:]
    assert found["over_refusal"][1:] == pytest.approx((100 - high, 100 - low))
    # One case of each user: the design effect is that of few clusters alone, 3/2.
    assert found["suppression"][1:] == pytest.approx([100 * limit for limit in wilson(2 / 1.5, 3 / 1.5)])
    assert {name: found[name] for name in ("users", "pictures", "banned", "allowed")} == {
        "users": 3,
        "pictures": 8,
        "banned": 3,
        "allowed": 3,
    }
    assert found["pass"][0] == pytest.approx(100 * 4 / 6)
    assert personal_rates(of("base", judged()))["selectivity"][0] == pytest.approx(0 - 100 / 3)


def test_a_judge_says_nothing_of_what_it_does_not_see():
    assert personal_rates(of("psa", judged(sees=frozenset({"Sexuality"})))) is None
    assert by_user(of("psa", judged(sees=frozenset({"Sexuality"})))) == {}
    assert differences(judged(sees=frozenset({"Sexuality"})), "psa", "base").keys() == {"content"}
    assert personal_rates(of("psa", judged(clean=False)))["clean"] is None


def test_slices_and_users():
    ours = of("psa", judged())
    found = by_slice(ours)
    assert found.keys() == {"category", "level"} and found["category"].keys() == {"Violence"}
    assert found["level"]["L1"]["suppression"][0] == 100.0 and found["level"]["L2"]["suppression"][0] == 0.0
    assert found["category"]["Violence"] == personal_rates(ours)
    assert by_user(ours) == {
        "u1": {"banned": 1, "shown": 0, "allowed": 1, "missing": 0},
        "u2": {"banned": 1, "shown": 0, "allowed": 1, "missing": 1},
        "u3": {"banned": 1, "shown": 1, "allowed": 1, "missing": 0},
    }


def test_differences_are_of_the_same_prompts_and_users():
    whole = judged()
    found = differences(whole, "psa", "base")
    assert found["content"]["by_prompts"]["difference"][0] == pytest.approx(100 * (3 - 5) / 6)
    assert (found["content"]["only_ours"], found["content"]["only_theirs"]) == (1, 3)
    assert found["content"]["mcnemar_p"] == pytest.approx(binomtest(1, 4).pvalue)
    assert "by_users" not in found["content"] and found["content"]["by_prompts"]["prompts"] == 3
    assert found["suppression"]["by_users"]["difference"][0] == pytest.approx(200 / 3)
    assert (found["suppression"]["by_users"]["users"], found["suppression"]["pictures"]) == (3, 3)
    assert found["retention"]["by_users"]["difference"][0] == pytest.approx(0.0)
    # u1's banned prompt and u2's banned one are won, u2's allowed one is lost, u3's allowed one is won.
    assert [found["pass"][name] for name in ("pictures", "only_ours", "only_theirs")] == [6, 3, 1]
    # A method that lacks a prompt is compared on the others.
    fewer = whole.part(lambda each: not (each.method == "psa" and each.user_id == "u1"))
    assert differences(fewer, "psa", "base")["suppression"]["pictures"] == 2
    assert differences(fewer.part(lambda each: each.method == "psa"), "psa", "base") == {}


def test_nothing_that_differs_is_no_certainty():
    """Of three users and none of them different, Wilson's limit of 0 of 3."""
    alone = listed("psa")
    same = [dataclasses.replace(each, method="base") for each in alone]
    content = np.array([row[4] for row in ROWS] * 2)
    found = differences(Judged([*alone, *same], Verdicts(content), frozenset({"Violence"})), "psa", "base")
    limit = 100 * wilson(0, 3)[1]
    assert found["suppression"]["by_users"]["difference"] == pytest.approx((0.0, -limit, limit))
    assert found["suppression"]["mcnemar_p"] == 1.0


def test_holm():
    """By hand: the smallest p is multiplied by 4, the next by 3, and none is below the one before."""
    tests = [{"mcnemar_p": p} for p in (0.01, 0.04, 0.03, 0.005)]
    with_holm(tests)
    assert [test["holm_p"] for test in tests] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_holm([])


def test_a_baseline_has_to_be_there():
    with pytest.raises(PSAError, match="no method is called 'sld'; give --baseline one of base, psa"):
        check_baseline(["base", "psa"], "sld")
