"""The record of a comparison: its rates are those of the runs, and the docs' table is made of the one that is kept."""

import json
from pathlib import Path

import pytest
from support.comparison_runs import CASES, DPO, SWAP
from support.comparison_runs import result as drawn

from psa_jax.errors import PSAError
from psa_jax.mini.comparison import config_of, markdown_table, pooled_rates, read_result, write_result
from psa_jax.mini.comparison_record import read_record, recorded_results, run_folder, unpack_record, write_record
from psa_jax.mini.protocol import HARDER

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def record(tmp_path) -> Path:
    """Two runs of one method, and their record."""
    folders = []
    for seed in range(2):
        result = drawn(seed)
        folders.append(run_folder(tmp_path / "first", result.method, seed))
        folders[-1].mkdir(parents=True)
        write_result(folders[-1], result, config_of(result.method, seed, SWAP, DPO), {"usual": CASES})
    write_record(tmp_path / "record.jsonl", folders, {"usual": CASES})
    return tmp_path / "record.jsonl"


def test_rates_of_the_record_are_those_of_the_runs(record):
    cases, runs = read_record(record)
    found = recorded_results(runs)
    expected = [drawn(seed) for seed in range(2)]
    assert pooled_rates(found, "usual", cases["usual"]) == pooled_rates(expected, "usual", CASES)
    assert markdown_table(found, "usual", cases["usual"]) == markdown_table(expected, "usual", CASES)
    assert not any(case.prompt or case.category for case in cases["usual"])
    assert not any(case.prompt in record.read_text() for case in CASES)


def test_a_comparison_goes_on_elsewhere(record, tmp_path):
    (tmp_path / "second").mkdir()
    assert unpack_record(record, tmp_path / "second") == 2
    assert unpack_record(record, tmp_path / "second") == 0
    for seed in range(2):
        result = drawn(seed)
        config = config_of(result.method, seed, SWAP, DPO)
        folder = run_folder(tmp_path / "second", result.method, seed)
        assert read_result(folder, config, {"usual": CASES}).seed == seed
        first = run_folder(tmp_path / "first", result.method, seed)
        assert json.loads((folder / "verdicts.json").read_text()) == json.loads((first / "verdicts.json").read_text())


def test_the_tables_of_the_docs_are_made_of_the_record_that_is_kept():
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    cases, runs = read_record(DOCS / "comparison.jsonl")
    results = recorded_results(runs)
    assert markdown_table(results, "usual", cases["usual"]) in page
    assert cases.keys() == {"usual", *HARDER}
    for group in HARDER:  # of some methods
        head, *rows = page.partition(f"\n**{group}**\n\n")[2].partition("\n\n")[0].splitlines()
        made = markdown_table(results, group, cases[group]).splitlines()
        assert head == made[0] and rows[0] == made[1] and len(rows) > 1 and set(rows[1:]) < set(made)


@pytest.mark.parametrize("change", [{"adapter": "../../edit"}, {"steps": "5/../../x"}, {"objective": "x"}])
def test_a_record_names_no_folder_of_its_own(record, tmp_path, change):
    first, run, _ = record.read_text().splitlines()
    bad = json.loads(run)
    bad["method"] |= change
    record.write_text(f"{first}\n{json.dumps(bad)}\n")
    with pytest.raises(PSAError, match="a run of no method that psa-jax compare has"):
        unpack_record(record, tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "text", ["", "{}\n", '{"format": "psa_jax.comparison/9"}\n', "runs\n", '{"format": "psa_jax.comparison/1"}\n']
)
def test_what_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "record.jsonl").write_text(text)
    with pytest.raises(PSAError, match=r"record\.jsonl"):
        read_record(tmp_path / "record.jsonl")
