"""Files for GitHub, git and citation: they parse, and say the versions that the project has."""

import re
from pathlib import Path

import pytest
import yaml

import psa_jax

ROOT = Path(__file__).resolve().parents[1]
FILES = [".github/workflows/tests.yml", ".pre-commit-config.yaml", "CITATION.cff"]
FILES += [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "request")]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_they_are_yaml(name: str):
    assert isinstance(read(name), dict)


def test_the_workflow_runs_what_contributors_run():
    jobs = read(".github/workflows/tests.yml")["jobs"]
    said = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {"make lint", "make test"} <= set(said)
    assert any("pip wheel" in text for text in said) and any(
        "psa-jax demo --config=tiny:smoke" in text for text in said
    )


def test_pre_commit_has_the_ruff_of_the_constraints():
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    for name in ("constraints.txt", "constraints-py312.txt"):
        pinned = re.search(r"^ruff==(.+)$", (ROOT / name).read_text(), re.M)[1]
        assert repo["rev"] == f"v{pinned}", name


def test_the_citation_is_of_this_version():
    about = read("CITATION.cff")
    assert about["version"] == psa_jax.__version__ and about["license"] == "Apache-2.0"
    assert "2508.01151" in (ROOT / "CITATION.cff").read_text()
