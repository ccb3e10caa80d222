"""encode and levels as a user calls them."""

import json
import stat

import numpy as np
import pytest
from PIL import Image

from psa_jax.cli import main
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
    assert "'0000007' is not in the embedding table" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


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
