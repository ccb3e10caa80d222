"""`psa-jax explain`: the gate of the adapter in words and numbers, for a user and prompts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.torch_adapters import random_adapter

from psa_jax.cli import main
from psa_jax.evaluation.gate_words import sentence
from psa_jax.interop.diffusers import TINY, load_stable_diffusion
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import FeatureEncoder
from psa_jax.profiles.schema import CATEGORIES, UserProfile

ENCODER = FeatureEncoder()
PROFILE = {"age": 9, "gender": "female"}
PROMPTS = ["a cat on a beach with a bell", "crossed blades and a house in the snow"]


@pytest.fixture(scope="module")
def tiny():
    return load_stable_diffusion(TINY)


def saved(folder, tiny, **sizes):
    config = AdapterConfig.for_unet(tiny.unet.config, user_dim=ENCODER.dim, kind="edit", **sizes)
    adapter = random_adapter(config)
    about = {"encoder": ENCODER.name, "encoder_fingerprint": ENCODER.fingerprint, "base_model": tiny.base_hash}
    save_adapter(adapter, folder / "a.safetensors", about | {"standardised": False})
    return adapter, f"--adapter={folder / 'a.safetensors'}"


def test_numbers_and_words(tmp_path, tiny, capsys):
    adapter, flag = saved(tmp_path, tiny, gate="categories", tokens=0)
    words = [f"--profile={json.dumps(PROFILE)}", *(f"--prompt={prompt}" for prompt in PROMPTS)]
    assert main(["explain", "--model=tiny", flag, *words]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    user = ENCODER.encode([UserProfile.from_mapping(PROFILE)])
    states = tiny.text_encoder(jnp.asarray(tiny.tokenize(PROMPTS))).last
    parts = np.asarray(adapter.gate.parts(states, jnp.tile(user, (2, 1))))
    bans = np.asarray(jax.nn.sigmoid(adapter.gate.ban_logits(jnp.asarray(user))))[0]
    np.testing.assert_allclose(list(found["user_bans"].values()), bans, atol=1e-4)
    for prompt, row, gates in zip(PROMPTS, found["prompts"], parts, strict=True):
        assert row["prompt"] == prompt and list(row["by_category"]) == list(CATEGORIES)
        np.testing.assert_allclose(list(row["by_category"].values()), gates, atol=1e-4)
        assert row["gate"] == pytest.approx(1 - np.prod(1 - gates), abs=1e-4)
        assert f"{prompt}: {sentence(gates)}" in err
    assert "female" not in err


def test_sentences_by_hand():
    one, two = np.zeros(7), np.zeros(7)
    one[CATEGORIES.index("Violence")] = 0.97
    two[CATEGORIES.index("Violence")], two[CATEGORIES.index("Hate")] = 0.3, 0.61
    assert sentence(one) == "replaced: Violence 0.97; you ban it"
    assert sentence(two) == "replaced: Hate 0.61, Violence 0.30; you ban them"
    assert sentence(np.full(7, 0.04)) == "nothing is replaced"


def test_what_it_refuses(tmp_path, tiny, capsys):
    _, flag = saved(tmp_path, tiny, tokens=2)
    words = [f"--profile={json.dumps(PROFILE)}", "--prompt=a cat"]
    assert main(["explain", "--model=tiny", flag, *words]) == 1
    assert "the edit adapter has no gate by categories, so" not in (said := capsys.readouterr().err)
    assert "has no gate by categories; train one with adapter.kind=edit" in said
    assert main(["explain", "--model=tiny", flag, "--prompt=a cat"]) == 1
    assert "an adapter needs a user" in capsys.readouterr().err
