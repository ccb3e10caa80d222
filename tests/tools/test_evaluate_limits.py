"""`psa-jax evaluate limits`: what it writes, for whom, and what it refuses."""

import json
import shutil

import pytest
from support.small_sage import BANS, write_sage
from support.torch_adapters import random_adapter

from psa_jax.cli import main
from psa_jax.data.sage import read_split
from psa_jax.evaluation import read_back
from psa_jax.interop.diffusers import TINY, load_stable_diffusion
from psa_jax.interop.native import save_adapter
from psa_jax.mini import limits
from psa_jax.mini.dataset import render_mini
from psa_jax.mini.protocol import HARDER
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.tools import evaluate_limits
from psa_jax.tools.configs import read_config

ENCODER = get_encoder("features")
CHEAP = ("prompts", "claimed", "between", "scale")
"""Variations of one sampling: one program to compile."""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """An untrained gate by categories, SAGE-mini of few users, and their table."""
    folder, model = tmp_path_factory.mktemp("limits"), load_stable_diffusion(TINY)
    render_mini(folder / "sage", 8, 1)
    profiles = {each.user_id: each.profile for each in read_split(folder / "sage", "test_unseen")}
    EmbeddingTable.from_profiles(list(profiles.values()), ENCODER).save(folder / "table.safetensors")
    save(folder / "psa_adapter.safetensors", model)
    return {"adapter": folder, "table": folder / "table.safetensors", "data": folder / "sage", "per-rate": 2}


def save(path, model, **about):
    config = AdapterConfig.for_unet(model.unet.config, user_dim=ENCODER.dim, kind="edit", gate="categories", tokens=0)
    known = {"base_model": model.base_hash, "encoder": ENCODER.name, "encoder_fingerprint": ENCODER.fingerprint}
    save_adapter(random_adapter(config), path, known | {"standardised": False} | about)


def command(flags, **changed) -> list[str]:
    return ["evaluate", "limits", *(f"--{name}={value}" for name, value in (flags | changed).items())]


def test_what_it_writes(words, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.setattr(limits, "VARIATIONS", {name: limits.VARIATIONS[name] for name in CHEAP})
    monkeypatch.setattr(limits, "POPULATION", 300)
    monkeypatch.setattr(read_back, "_TREES", 10)
    monkeypatch.setattr(evaluate_limits, "read_config", lambda name: read_config(f"{name}:smoke"))
    given = command(words, out=tmp_path / "out", seed=3)
    assert main(given) == 0
    out, err = capsys.readouterr()
    report = json.loads((tmp_path / "out" / "limits.json").read_text())
    page = (tmp_path / "out" / "limits.md").read_text()
    assert json.loads(out.splitlines()[-1])["result"] == str(tmp_path / "out" / "limits.json") and page in out
    assert "drawing variations: " in err
    found = report["variations"]
    assert found.keys() == set(CHEAP) and found["prompts"].keys() == {"usual", *HARDER}
    usual = found["prompts"]["usual"]["rates"]
    assert (usual["banned"], usual["allowed"]) == (2, 2) and usual["suppression"][1] <= usual["suppression"][0]
    assert found["prompts"]["two"]["rates"]["banned"] == 1  # a third, and at least one
    assert found["between"]["0.0"] == {"rates": found["claimed"][limits.WITHOUT_BANS]["rates"]}
    assert found["between"]["1.0"] == found["scale"]["1.0"] == found["prompts"]["usual"]
    assert report["read_back"]["religion"].keys() == {"guess", "embedding", "gates", "bits", "users"}
    assert report["seed"] == 3 and len(report["adapter"]["sha256"]) == 64 and report["versions"]["scikit-learn"]
    assert report["command"].startswith("psa-jax evaluate limits --adapter=")
    # Counts alone, and still their owner's.
    ids = EmbeddingTable.load(words["table"]).ids
    assert not [user for user in ids if user in page + json.dumps(report) + out + err]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o600}
    assert "| … against the claimed user's bans |" in page and "| religion | logistic regression | 100.0 (" in page
    assert "limits.json: exists already; give another --out" in refused(*given)


def test_what_it_refuses(words, tmp_path, refused):
    out = tmp_path / "out"
    model = load_stable_diffusion(TINY)

    def error(**changed) -> str:
        said = refused(*command(words, out=out, **changed))
        assert not out.exists()
        return said

    save(tmp_path / "other.safetensors", model, base_model="0" * 64)
    assert "trained for another base model" in error(adapter=tmp_path / "other.safetensors")
    save(tmp_path / "qwen.safetensors", model, encoder="qwen")
    assert "(qwen); give one that was trained with the encoder features" in error(adapter=tmp_path / "qwen.safetensors")
    table = EmbeddingTable.load(words["table"])
    table.without(*table.ids[1:]).save(tmp_path / "few.safetensors")
    said = error(table=tmp_path / "few.safetensors")
    assert "the table lacks" in said and not [user for user in table.ids if user in said]
    table.standardised().save(tmp_path / "scaled.safetensors")
    assert "only one of adapter and table is standardised" in error(table=tmp_path / "scaled.safetensors")
    write_sage(tmp_path / "sage", BANS, "test_unseen")
    assert "not SAGE-mini, whose oracle judges here" in error(data=tmp_path / "sage")
    assert "test_unseen" in error(data=tmp_path)
    # One user bans too little for each group.
    shutil.copytree(words["data"] / "test_unseen", tmp_path / "one" / "test_unseen")
    lines = tmp_path / "one" / "test_unseen" / "metadata.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:16]))
    assert "in one of its groups; render more users (psa-jax mini --users=100)" in error(data=tmp_path / "one")
