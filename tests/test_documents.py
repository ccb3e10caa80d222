"""README and docs: links lead somewhere, README is short, and its Python runs as it stands."""

import json
import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.torch_adapters import random_adapter

import psa_jax
from psa_jax.cli import main
from psa_jax.interop.diffusers import TINY, load_stable_diffusion
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.preference import losses
from psa_jax.preference.objective import Objective
from psa_jax.profiles.encoders import get_encoder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "launch" / "README.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert page != PAGES[0] or len(links) >= 10
    for link in links:
        if not link.startswith(("https://", "http://")):
            assert (page.parent / link).exists(), link


def test_the_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert {page.name for page in PAGES[1:]} <= set(re.findall(r"\(docs/([\w-]+\.md)\)", text))


def python_of(page: Path, title: str) -> str:
    """The first indented block of a section."""
    section = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.sub(r"^    ", "", re.search(r"(?:^    .*\n|^\n(?=    ))+", section, re.M)[0], flags=re.M)


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    encoder, model = get_encoder("features"), load_stable_diffusion(TINY)
    config = AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim, kind="text", tokens=1)
    about = {"base_model": model.base_hash, "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    save_adapter(random_adapter(config), tmp_path / "adapter.safetensors", about)
    monkeypatch.chdir(tmp_path)
    code = python_of(ROOT / "README.md", "In Python")
    assert len(code.strip().splitlines()) <= 6
    exec(compile(code.replace("guidance=4)", "guidance=4, steps=2)"), "README", "exec"), {})
    with Image.open("picture.png") as picture:
        assert picture.size == (64, 64) and np.asarray(picture).std() > 1


@pytest.fixture
def own_pairs(tmp_path, monkeypatch) -> str:
    """The page about own data; in the working folder 30 rows at random, as it says, and six users."""
    random = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs" / "pictures").mkdir(parents=True)
    (tmp_path / "embeddings").mkdir()
    for user in range(1, 7):
        np.save(tmp_path / "embeddings" / f"{user:07d}.npy", random.normal(size=24).astype(np.float32))
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in re.findall(r"^    (\{.*)$", page, re.M)]
    rows = []
    for row in range(30):
        for name in ("s", "u"):
            pixels = random.integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pairs" / "pictures" / f"{row}{name}.png")
        pictures = {key: lines[row % 2][key].replace("1", str(row)) for key in ("chosen", "rejected")}
        rows.append(lines[row % 2] | pictures | {"user_id": f"{random.integers(1, 7):07d}"})
    (tmp_path / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return page


@pytest.fixture
def kept_losses():
    """Takes away what a test adds to the table of losses."""
    kept = dict(losses.LOSSES)
    yield kept
    losses.LOSSES.clear()
    losses.LOSSES.update(kept)


def test_own_pairs_become_an_adapter_by_the_page_alone(own_pairs):
    (block,) = re.findall(r"(?:^    psa-jax .*\n)+", own_pairs, re.M)
    for command in block.splitlines():
        words = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))
        few = ["--config.steps=2", "--config.batch_size=4", "--config.optimizer.warmup_steps=1"]
        assert main([*words[1:], *(few if words[1] == "train" else [])]) == 0
    adapter = psa_jax.load_adapter("adapter.safetensors")
    assert (adapter.config.kind, adapter.config.user_dim, adapter.config.tokens) == ("edit", 24, 8)


def test_a_notebook_from_own_pairs_to_a_picture(own_pairs, monkeypatch, kept_losses):
    """Own data and an own loss, trained, plotted and drawn with: the pages' lines as they stand, but for the steps."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert main(["encode", "embeddings", "--out=table.safetensors"]) == 0
    code = python_of(ROOT / "docs" / "own-data.md", "In a notebook")
    few = '"steps": 2, "batch_size": 4, "log_every": 1, "optimizer.warmup_steps": 1, "objective.loss": "squared"'
    assert '"steps": 540' in code and "guidance=4" in code and len(code.strip().splitlines()) <= 12
    code = code.replace('"steps": 540', few).replace("guidance=4", "guidance=4, steps=2")
    exec(compile(python_of(ROOT / "docs" / "losses.md", "A loss of your own") + code, "own-data.md", "exec"), {})
    assert psa_jax.curves("runs/notebook")["loss"]["step"] == [1, 2]
    assert json.loads(Path("runs/notebook/config.json").read_text())["objective"]["loss"] == "squared"
    for name in ("loss.png", "picture.png"):
        with Image.open(name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 1


def test_a_loss_of_ones_own_is_a_name(kept_losses):
    exec(compile(python_of(ROOT / "docs" / "losses.md", "A loss of your own"), "docs/losses.md", "exec"), {})
    (name,) = losses.LOSSES.keys() - kept_losses.keys()
    assert Objective(loss=name).needs_reference
    errors = jnp.asarray([[0.1], [0.3], [0.2], [0.2]])  # the policy prefers the winner by 0.2: z = 0.1·β
    found = losses.LOSSES[name].function(*errors, beta=20.0)
    np.testing.assert_allclose(found, [np.log1p(np.exp(-2.0)) ** 2], rtol=1e-6)
