"""`psa-jax memory` tells what a step holds, without the weights and without the devices."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from psa_jax.cli import main
from psa_jax.interop import diffusers
from psa_jax.interop.diffusers import MODELS, load_stable_diffusion
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.training import lowered

CONFIG = f"--config={Path(__file__).resolve().parents[2] / 'configs' / 'tiny.py'}:dpo"


def test_the_arguments_of_a_step(sd1, capsys):
    folder, theirs = sd1
    assert main(["memory", CONFIG, f"--config.model={folder}", "--config.batch_size=2", "--config.remat=full"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("psa-jax: compiling the training step of 2 pairs for 8 cpu; no step is run\n")
    found = json.loads(out)
    frozen = sum(p.numel() for part in (theirs.unet, theirs.text_encoder) for p in part.parameters())
    unet = load_stable_diffusion(folder, abstract=MODELS).unet.config
    adapter = AdapterConfig.for_unet(unet, user_dim=33, kind="text", tokens=8)
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(Adapter(adapter, rngs=nnx.Rngs(0)))))
    side = unet.sample_size
    batch = 2 * (2 * side * side * 8 * 2 + 33 * 4 + 77 * 4 + 1 + 1) + 77 * 4  # moments in float16, user, tokens, flags
    expected = 4 * frozen + 3 * 4 * trained + batch + 1000 * 4  # AdamW has two moments; the schedule has 1,000 steps
    assert expected <= found["arguments_bytes"] <= expected + 1024  # counters and the key
    assert found["temporaries_bytes"] > 2 * 2 * side * side * 8 * 4
    assert found["total_bytes"] >= found["arguments_bytes"] + found["temporaries_bytes"]
    assert (found["device"], found["mesh"], found["remat"]) == ("cpu", {"data": 1, "fsdp": 1}, "full")


def test_no_weight_is_read(sd1, monkeypatch):
    def read(*args, **settings):
        raise AssertionError("weights were read")

    monkeypatch.setattr(diffusers, "load_weights", read)
    model = load_stable_diffusion(sd1[0], dtype=jnp.bfloat16, abstract=MODELS)
    leaves = jax.tree.leaves(nnx.state((model.unet, model.vae, model.text_encoder)))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.dtype == jnp.bfloat16 for leaf in leaves)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.model="], "--model=PATH"),
        (["--config.batch_size=3", "--config.mesh.data=2"], "batch_size = 3 cannot be divided"),
        (["--topology=v5e:2x2"], "pip install 'psa_jax[tpu]'"),
    ],
)
def test_what_cannot_be_told(flags, words, capsys, monkeypatch):
    monkeypatch.setattr(lowered.importlib.util, "find_spec", lambda name: None)
    assert main(["memory", CONFIG, *flags]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fits", [True, False])
def test_a_slice_that_is_not_here(fits, capsys):
    """libtpu compiles for it: a quarter of the frozen weights on each device; or the line that says it is too much."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install 'psa_jax[tpu]'")
    flags = [CONFIG, "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.frozen=split"]
    if not fits:
        assert main(["memory", *flags, "--resolution=2048"]) == 1
        assert "does not fit v5e:2x2" in capsys.readouterr().err
        return
    assert main(["memory", *flags]) == 0
    split = json.loads(capsys.readouterr().out)
    assert main(["memory", *flags[:-1]]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert split["device"] == "TPU v5 lite"
    weights = 4 * sum(np.prod(x.shape) for x in jax.tree.leaves(nnx.state(load_stable_diffusion("tiny").unet)))
    assert whole["arguments_bytes"] - split["arguments_bytes"] == pytest.approx(0.75 * weights, rel=0.2)
