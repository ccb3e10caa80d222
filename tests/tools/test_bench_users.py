"""`psa-jax bench generate --users`: every user of a batch gets the picture of that user's own call."""

import json

import pytest

from psa_jax.cli import main


@pytest.mark.slow
def test_four_users(tmp_path, capsys):
    words = ["--users=4", "--steps=1", f"--json={tmp_path / 'users.json'}"]
    assert main(["bench", "generate", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "users.json").read_text()) and result["users"] == 4
    for name in ("jax", "diffusers"):
        assert result[f"{name}_largest_difference_to_own_call"] <= 1e-3
        assert result[f"{name}_ratio"] > 0 and result[f"{name}_pictures_per_second"] > 0
