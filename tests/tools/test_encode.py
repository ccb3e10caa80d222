"""encode and levels as a user calls them."""

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_jax.cli import main
from psa_jax.mini.dataset import render_mini
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population, write_users_csv
from psa_jax.profiles.table import EmbeddingTable


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.csv"
    write_users_csv(path, sample_population(60))
    return path


def test_features_of_a_users_file_raw_and_standardised(users, tmp_path, capsys):
    raw, scaled = tmp_path / "raw.safetensors", tmp_path / "scaled.safetensors"
    assert main(["encode", str(users), f"--out={raw}"]) == 0
    assert main(["encode", str(users), "--standardise", f"--out={scaled}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["users"] == 60
    table = EmbeddingTable.load(raw)
    np.testing.assert_array_equal(table.embeddings, get_encoder("features").encode(sample_population(60)))
    np.testing.assert_allclose(EmbeddingTable.load(scaled).embeddings.mean(axis=0), 0.0, atol=1e-6)
    assert stat.S_IMODE(raw.stat().st_mode) == 0o600


def test_a_forgotten_user_is_gone_from_the_file(users, tmp_path, capsys):
    path = tmp_path / "table.safetensors"
    assert main(["encode", str(users), f"--out={path}"]) == 0
    before = EmbeddingTable.load(path)
    assert main(["encode", str(path), "--forget=0000007"]) == 0
    after = EmbeddingTable.load(path)
    assert "0000007" not in after.ids and b"0000007" not in path.read_bytes()
    np.testing.assert_array_equal(after.embeddings, np.delete(before.embeddings, before.ids.index("0000007"), axis=0))
    assert main(["encode", str(path), "--forget=0000007"]) == 1
    error = capsys.readouterr().err
    assert "'0000007' is not in the embedding table: nothing is forgotten" in error and "encode it" not in error
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_several_users_are_forgotten_together_or_not_at_all(users, tmp_path, capsys):
    path = tmp_path / "table.safetensors"
    assert main(["encode", str(users), f"--out={path}"]) == 0
    whole = EmbeddingTable.load(path)
    before = path.read_bytes()
    assert main(["encode", str(path), "--forget=0000003", "--forget=0000999"]) == 1
    assert "'0000999'" in capsys.readouterr().err and path.read_bytes() == before

    assert main(["encode", str(path), "--forget=0000007", "--forget=0000003", "--forget=0000007"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["forgotten"] == ["0000007", "0000003"] and last["users"] == 58
    after = EmbeddingTable.load(path)
    assert after.ids == [user for user in whole.ids if user not in ("0000003", "0000007")]
    np.testing.assert_array_equal(after.embeddings, np.delete(whole.embeddings, [2, 6], axis=0))
    assert not any(user in path.read_bytes() for user in (b"0000003", b"0000007"))
    assert main(["encode", str(path), *(f"--forget={user}" for user in after.ids)]) == 1
    assert "delete the file" in capsys.readouterr().err


@pytest.mark.parametrize("standardise", [False, True])
def test_users_are_added_to_a_table_and_none_is_lost(users, tmp_path, capsys, standardise):
    path, more = tmp_path / "table.safetensors", tmp_path / "more.csv"
    assert main(["encode", str(users), f"--out={path}", *["--standardise"] * standardise]) == 0
    old, new = path.read_bytes(), sample_population(70)[55:]
    write_users_csv(more, new)

    assert main(["encode", str(more), f"--out={path}"]) == 1
    assert "exists already; give another --out, or --add" in capsys.readouterr().err
    assert main(["encode", str(more), f"--out={path}", "--add"]) == 1
    assert "5 of the new users are in the embedding table already, such as 0000056" in capsys.readouterr().err
    assert main(["encode", str(more), f"--out={path}", "--add", "--encoder=features-no-bans"]) == 1
    assert "use its encoder" in capsys.readouterr().err
    assert path.read_bytes() == old

    table = EmbeddingTable.load(path)
    damaged = table.embeddings.copy()
    damaged[57] = 0.0
    dataclasses.replace(table, embeddings=damaged).save(path)
    assert main(["encode", str(more), f"--out={path}", "--update"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["users"], last["added"], last["updated"]) == (70, 10, 5)
    after = EmbeddingTable.load(path)
    assert after.ids == [f"{number:07d}" for number in range(1, 71)]
    np.testing.assert_array_equal(after.embeddings[:60], table.embeddings)
    raw = get_encoder("features").encode(new[5:])
    np.testing.assert_array_equal(after.embeddings[60:], (raw - table.mean) / table.std if standardise else raw)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    write_users_csv(tmp_path / "last.csv", sample_population(71)[70:])
    assert main(["encode", str(tmp_path / "last.csv"), f"--out={path}", "--add"]) == 0
    assert len(EmbeddingTable.load(path).ids) == 71


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["population", "--n=3", "--out=OUT/users.csv"], "users.csv"),
        (["encode", "USERS", "--out=OUT/table.safetensors"], "table.safetensors"),
        (["levels", "TABLE", "--users=USERS", "--out=OUT"], "levels.json"),
        (["levels", "TABLE", "--users=USERS", "--out=OUT"], "levels.png"),
        (["mini", "--users=1", "--out=OUT"], "notes.txt"),
        (["check", "SAGE", "--json=OUT/report.json"], "report.json"),
        (["check", "SAGE", "--quarantine=OUT/bad.jsonl"], "bad.jsonl"),
        (["check", "OUT"], "quarantine.jsonl"),
        (["bench", "input", "--json=OUT/input.json"], "input.json"),
        (["bench", "step", "--json=OUT/step.json"], "step.json"),
        (["bench", "generate", "--json=OUT/generate.json"], "generate.json"),
        (["demo", "--compare", "--record=OUT/recorded.json", "--workdir=OUT/run"], "recorded.json"),
    ],
)
def test_no_command_replaces_a_file(users, tmp_path, capsys, words, written):
    out, table, sage = tmp_path / "out", tmp_path / "table.safetensors", tmp_path / "sage"
    out.mkdir()
    sage.mkdir()
    EmbeddingTable.from_profiles(sample_population(60), get_encoder("features")).save(table)
    (out / written).write_text("mine")
    for name, path in (("OUT", out), ("USERS", users), ("TABLE", table), ("SAGE", sage)):
        words = [word.replace(name, str(path)) for word in words]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert ("exists" in error) and error.count("\n") == 1 and str(out) in error
    assert (out / written).read_text() == "mine" and [path.name for path in out.iterdir()] == [written]


def test_a_check_renews_its_own_quarantine(tmp_path, capsys):
    render_mini(tmp_path / "sage", 1, 0)
    metadata = tmp_path / "sage" / "train" / "metadata.jsonl"
    whole = metadata.read_bytes()
    for content, bad in ((b"{}\n" + whole, 1), (b"{}\n[]\n" + whole, 2), (whole, 0)):
        metadata.write_bytes(content)
        assert main(["check", str(tmp_path / "sage"), "--no-images"]) == int(bad > 0)
        lines = (tmp_path / "sage" / "quarantine.jsonl").read_bytes().splitlines()
        assert len(lines) == bad == json.loads(capsys.readouterr().out.splitlines()[-1])["bad"]


def test_sage_mini_is_its_owners(tmp_path):
    """Profiles are in its metadata; the mask of the process does not decide who reads them."""
    before = os.umask(0)
    try:
        render_mini(tmp_path / "sage", 1, 0)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "sage").stat().st_mode) == 0o700
    found = list((tmp_path / "sage").glob("*/metadata.jsonl"))
    assert len(found) == 4 and {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}


def test_git_takes_nothing_that_the_documents_write(tmp_path):
    """A copy of .gitignore in a new repository: `git add -A` after every command of the documents."""
    root = Path(__file__).resolve().parents[2]
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    written = set(re.findall(r"--(?:out|workdir|json)=([^\s`]+)", text)) - {"PATH"}
    written = {name for name in written if not name.startswith("/")}
    assert {"users.csv", "sage-mini", "table.safetensors", "levels", "shards", "pictures"} <= written
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    shutil.copy(root / ".gitignore", tmp_path)
    for name in written:
        path = tmp_path / name
        path = path if path.suffix else path / "rows.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for name in ("sage/quarantine.jsonl", "shards.parts/1", "data/people.csv", "data/0000001.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    told = subprocess.run(
        ["git", "-C", tmp_path, "add", "--all", "--dry-run"], check=True, capture_output=True, text=True
    ).stdout
    assert told == "add '.gitignore'\n"


def test_git_takes_the_projects_own_files():
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a clone")
    left = subprocess.run(["git", "-C", root, "ls-files", "-ci", "--exclude-standard"], capture_output=True, check=True)
    assert left.stdout == b""


def test_a_folder_of_npy_files(shared_data, tmp_path):
    path = tmp_path / "table.safetensors"
    assert main(["encode", str(shared_data / "embeddings"), f"--out={path}"]) == 0
    assert EmbeddingTable.load(path).dim == 3584


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --out"),
        (["--out=OUT", "--encoder=qwen"], "needs --model DIR"),
        (["--out=OUT", "--ask-model"], "are for --encoder=qwen"),
        (["--out=OUT", "--encoder=qwen", "--model=missing"], "no such model folder"),
        (["--forget=0000001", "--out=OUT"], "leave out --out"),
        (["--forget=0000001", "--add"], "leave out --out, --add"),
        (["--out=OUT", "--add"], "no embedding table there to add to"),
        (["--out=OUT", "--update", "--standardise"], "get the scale that the table has"),
    ],
)
def test_bad_input_is_one_line(users, tmp_path, capsys, words, message):
    words = [word.replace("OUT", str(tmp_path / "out.safetensors")) for word in words]
    assert main(["encode", str(users), *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["users.csv"]


def test_levels_of_a_table(users, tmp_path, capsys):
    table = tmp_path / "table.safetensors"
    assert main(["encode", str(users), f"--out={table}"]) == 0
    assert main(["levels", str(table), f"--users={users}", f"--out={tmp_path / 'levels'}"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = json.loads((tmp_path / "levels" / "levels.json").read_text())
    assert sum(last["users"].values()) == 60 == len(found["level"])
    assert all(found["level"][user] in (0, int(name[1])) for name, user in found["centres"].items())
    picture = np.asarray(Image.open(tmp_path / "levels" / "levels.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert stat.S_IMODE((tmp_path / "levels" / "levels.json").stat().st_mode) == 0o600
