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
from psa_jax.profiles.encoders import get_encoder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    assert page.name != "README.md" or len(links) >= 10
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


def test_own_pairs_become_an_adapter_by_the_page_alone(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs" / "pictures").mkdir(parents=True)
    (tmp_path / "embeddings").mkdir()
    for user in range(1, 7):
        np.save(tmp_path / "embeddings" / f"{user:07d}.npy", random.normal(size=24).astype(np.float32))
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in re.findall(r"^    (\{.*)$", page, re.M)]
    for row in range(30):
        for name in ("s", "u"):
            pixels = random.integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pairs" / "pictures" / f"{row}{name}.png")
        pictures = {key: lines[row % 2][key].replace("1", str(row)) for key in ("chosen", "rejected")}
        user = {"user_id": f"{random.integers(1, 7):07d}"}
        with (tmp_path / "pairs" / "train.jsonl").open("a") as file:
            file.write(json.dumps(lines[row % 2] | pictures | user) + "\n")
    (block,) = re.findall(r"(?:^    psa-jax .*\n)+", page, re.M)
    for command in block.splitlines():
        words = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))
        steps = (
            ["--config.steps=2", "--config.batch_size=4", "--config.optimizer.warmup_steps=1"]
            if words[1] == "train"
            else []
        )
        assert main([*words[1:], *steps]) == 0
    adapter = psa_jax.load_adapter("adapter.safetensors")
    assert (adapter.config.kind, adapter.config.user_dim, adapter.config.tokens) == ("edit", 24, 8)
    pipe = psa_jax.load("tiny", adapter="adapter.safetensors", table="table.safetensors")
    settings = dict(seed=1, steps=2)
    drawn = [np.asarray(pipe.generate("a spider", user="0000001", scale=scale, **settings)) for scale in (0.0, 1.0)]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() >= 1  # two steps have changed something


def test_a_loss_of_ones_own_is_a_name():
    from psa_jax.preference import losses
    from psa_jax.preference.objective import Objective

    kept = dict(losses.LOSSES)
    try:
        exec(compile(python_of(ROOT / "docs" / "losses.md", "A loss of your own"), "docs/losses.md", "exec"), {})
        (name,) = losses.LOSSES.keys() - kept.keys()
        assert Objective(loss=name).needs_reference
        errors = jnp.asarray([[0.1], [0.3], [0.2], [0.2]])  # the policy prefers the winner by 0.2: z = 0.1·β
        found = losses.LOSSES[name].function(*errors, beta=20.0)
        np.testing.assert_allclose(found, [np.log1p(np.exp(-2.0)) ** 2], rtol=1e-6)
    finally:
        losses.LOSSES.clear()
        losses.LOSSES.update(kept)
