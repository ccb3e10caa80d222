"""docs/torch.md: its snippets run in their order, and its lists are those of the tests."""

import copy
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import test_all_pipelines
import test_switches
import torch
from diffusers import DDIMScheduler
from support.torch_adapters import random_adapter
from support.torch_runtime import IDS, STEPS, difference, draw

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import TINY, load_unet
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.torch import load_psa

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "torch.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}")[2].partition("\n## ")[0]


def snippets(text: str) -> list[str]:
    """Indented blocks."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.M)
    return [re.sub(r"^    ", "", block, flags=re.M).strip("\n") + "\n" for block in blocks if block.strip()]


def few_steps(monkeypatch) -> None:
    """The snippets take the pipelines' default of 50 steps; that they run shows in 12."""
    set_timesteps = DDIMScheduler.set_timesteps
    monkeypatch.setattr(
        DDIMScheduler, "set_timesteps", lambda self, steps, *args, **kwargs: set_timesteps(self, 12, *args, **kwargs)
    )


def in_code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.filterwarnings("ignore")  # a reader's warnings are not ours
def test_its_snippets_run(tmp_path, monkeypatch):
    encoder = get_encoder("features")
    (tmp_path / "stable-diffusion-v1-5").symlink_to(TINY)
    EmbeddingTable.from_profiles(sample_population(3), encoder).save(tmp_path / "table.safetensors")
    (tmp_path / "adapter").mkdir()
    config = AdapterConfig.for_unet(load_unet(TINY).config, user_dim=encoder.dim, kind="text")
    about = {"encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    save_adapter(random_adapter(config), tmp_path / "adapter" / "psa_adapter.safetensors", about)
    monkeypatch.chdir(tmp_path)
    few_steps(monkeypatch)
    # No compiler is needed here; that the UNet is one graph is tested elsewhere.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    install, *blocks = snippets(PAGE)
    assert "pip install" in install
    assert len(blocks) == 8
    names: dict = {}
    for index, block in enumerate(blocks):
        torch.manual_seed(0)
        exec(compile(block, f"docs/torch.md, snippet {index}", "exec"), names)
        if index == 0:
            with pytest.raises(PSAError, match="no user was given"):
                names["pipe"]("a street")
        drawn = [*names.get("images", []), *names.get("edited", []), *([names["image"]] if "image" in names else [])]
        assert drawn and all(np.asarray(picture).std() > 1 for picture in drawn)
    assert not hasattr(names["pipe"].unet._orig_mod, "psa")


def test_the_way_to_install_is_the_tested_one():
    install = section("Installing it alone")
    for words in ("-r psa_jax/torch/requirements.txt", "--no-deps ."):
        assert words in install
    listed = [line for line in (ROOT / "psa_jax/torch/requirements.txt").read_text().splitlines() if line[0] != "#"]
    assert "seven packages" in install and len(listed) == 7


def test_its_pipelines_are_those_of_the_tests():
    text = section("Pipelines")
    works, _, refused = text.partition("These are refused")
    classes = {name for name in in_code(works.partition("The user is in")[0]) if name.endswith("Pipeline")}
    assert classes == {name.partition(",")[0] for name in test_all_pipelines.WORKS}
    refused = refused.partition("Pipelines may share")[0]
    assert {name for name in in_code(refused) if name.endswith("Pipeline")} == test_all_pipelines.REFUSED.keys()


def test_its_changes_are_those_of_the_tests():
    text = section("What may happen")
    protected, _, rest = text.partition("\nProtected, ")[2].partition("\nRefused: ")
    refused, _, rest = rest.partition("\nThe last five ")
    during = rest.partition("a\ncall: ")[2].partition("\n\n")[0]
    for said, tested in (
        (protected, test_switches.PROTECTED),
        (refused, test_switches.REFUSED),
        (during, test_switches.DURING),
    ):
        assert in_code(said) == [name.strip() for name in tested]
    assert set(list(test_switches.REFUSED)[-5:]) == test_switches.HERE_TO_STAY
    assert f"{len(test_switches.PROTECTED) + len(test_switches.REFUSED)} changes are tested" in text


def test_compiled_before_load_psa(models, table):
    model, path = models["text"]
    expected = draw(load_psa(copy.deepcopy(model), path, table=table), user=IDS, **STEPS)
    pipe = copy.deepcopy(model)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert difference(draw(load_psa(pipe, path, table=table), user=IDS, **STEPS), expected) <= 1e-5


def test_where_the_adapter_works(models, table):
    model, path = models["text"]
    psa = load_psa(copy.deepcopy(model).to(torch.bfloat16), path, table=table, device="cpu")
    psa("a cat", user=IDS[0], output_type="np", **STEPS)
    assert {(p.device.type, p.dtype) for p in psa.adapter.parameters()} == {("cpu", torch.float32)}


def test_readme_links_here():
    assert "(docs/torch.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
