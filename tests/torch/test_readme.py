"""The snippets for diffusers of README and docs/export.md run as they stand."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from support.torch_adapters import random_adapter

from psa_jax.cli import main
from psa_jax.interop.diffusers import TINY, load_unet
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable

ROOT = Path(__file__).resolve().parents[2]


def snippets() -> list[str]:
    """Indented blocks that import something."""
    lines = (ROOT / "docs" / "export.md").read_text(encoding="utf-8").splitlines()
    blocks, block = [], []
    for line in [*lines, "end"]:
        if line.startswith("    ") or (not line and block):
            block.append(line[4:])
        else:
            blocks.append("\n".join(block))
            block = []
    return [text for text in blocks if "import " in text]


def test_there_are_three():
    assert [("load_psa" in s, "load_ip_adapter" in s, "prompt_embeds" in s) for s in snippets()] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert snippets()[0].strip("\n") in (ROOT / "README.md").read_text(encoding="utf-8").replace("\n    ", "\n")
    assert "psa_jax" not in snippets()[1]
    assert len(snippets()[1].splitlines()) <= 11  # ten lines that run, and an empty one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the snippets find where they run: the embedded model in the place of SD1.5, adapters, a table."""
    folder, encoder = tmp_path_factory.mktemp("readme"), get_encoder("features")
    (folder / "stable-diffusion-v1-5").symlink_to(TINY)
    EmbeddingTable.from_profiles(sample_population(3), encoder).save(folder / "table.safetensors")
    for name, kind in (("adapter", "text"), ("ip", "published"), ("prompt-adapter", "prompt")):
        config = AdapterConfig.for_unet(load_unet(TINY).config, user_dim=encoder.dim, kind=kind)
        save_adapter(random_adapter(config), folder / f"{kind}.safetensors", {"encoder": encoder.name})
        words = ["--format=ip-adapter"] if name == "ip" else []
        assert main(["export", str(folder / f"{kind}.safetensors"), *words, f"--out={folder / name}"]) == 0
    return folder


@pytest.mark.filterwarnings("ignore")  # a reader's warnings are not ours
@pytest.mark.parametrize("index", range(3))
def test_it_runs(folder, monkeypatch, index):
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(snippets()[index], f"snippet {index}", "exec"), names)
    drawn = names.get("images") or [names["image"]]
    assert len(drawn) == (2 if index == 0 else 1)
    assert all(np.asarray(picture).std() > 1 for picture in drawn)
    assert set(safetensors.numpy.load_file("table.safetensors")) == {"embeddings"}
