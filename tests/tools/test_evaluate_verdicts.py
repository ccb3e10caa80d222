"""`psa-jax evaluate verdicts`: the table, the result and what is refused."""

import json

import pytest

from psa_jax.cli import main

HEADER = (
    "dataset,backbone,method,user_id,category,category_banned,overall_assessment,banned_respected,"
    "allowed_respected,quality_score,appropriateness_score,comment"
)


@pytest.fixture
def verdicts(tmp_path):
    lines = [
        f"sage,sd15,{method},{user:07d},Violence,{user % 2},{'PASS' if method == 'psa' else 'FAIL'},1,1,80,80,x"
        for method in ("base", "psa")
        for user in range(8)
    ]
    (tmp_path / "v.csv").write_text("\n".join([HEADER, *lines]))
    return tmp_path / "v.csv"


def test_totals_are_printed_and_written(verdicts, tmp_path, capsys):
    assert main(["evaluate", "verdicts", str(verdicts), f"--json={tmp_path / 'r.json'}"]) == 0
    *_, base, ours, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert result["totals"]["sage"]["psa_sd15"]["pass_rate"] == 100.0 and result["baseline"] == "base"
    assert base.split()[:5] == ["sage", "base", "sd15", "8", "8"] and base.endswith("–")
    assert ours.endswith("100.0 (100.0 to 100.0)")
    assert [each["method"] for each in result["by_ban"]] == ["base", "psa"]
    assert main(["evaluate", "verdicts", str(verdicts), f"--json={tmp_path / 'r.json'}"]) == 1
    assert "r.json" in capsys.readouterr().err


def test_a_baseline_that_is_not_there(verdicts, capsys):
    assert main(["evaluate", "verdicts", str(verdicts), "--baseline=sld"]) == 1
    assert "no method is called 'sld' in the verdicts; give one of base, psa" in capsys.readouterr().err
