"""Servers that draw with a random adapter with the gate by categories, on the smallest model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.playground_server import Served, serving
from support.torch_adapters import random_adapter

import psa_jax
from psa_jax.categories import CATEGORIES
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.pipeline import Pipeline
from psa_jax.playground.studio import Studio
from psa_jax.profiles.encoders import get_encoder


def saved(model: BaseModel, path: Path, change: Callable[[Adapter], None] = lambda adapter: None) -> Path:
    """Writes a random adapter with the gate by categories, changed."""
    encoder = get_encoder("features")
    sizes = {"kind": "edit", "gate": "categories", "tokens": 0}
    adapter = random_adapter(AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim, **sizes))
    change(adapter)
    about = {"base_model": model.base_hash, "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    save_adapter(adapter, path, about)
    return path


def read_bans_but_hate(adapter: Adapter) -> None:
    """Makes the user half of the gate say what the profile's bits say: yes or no, and never that Hate is banned."""
    half, bits = adapter.gate.user, get_encoder("features").fields.index(f"bans={CATEGORIES[0]}")
    each = np.arange(len(CATEGORIES))
    half.first[...] = jnp.zeros_like(half.first[...]).at[bits + each, each].set(20.0)
    half.first_bias[...] = jnp.zeros_like(half.first_bias[...])
    half.second[...] = jnp.zeros_like(half.second[...]).at[each, each].set(10.0)
    half.second_bias[...] = jnp.full(len(CATEGORIES), -100.0).at[CATEGORIES.index("Hate")].set(-1000.0)


@pytest.fixture(scope="session")
def adapter_file(smallest_pipeline, tmp_path_factory):
    return saved(smallest_pipeline[1], tmp_path_factory.mktemp("playground") / "a.safetensors")


@pytest.fixture(scope="session")
def served_bits(smallest_pipeline, tmp_path_factory) -> Iterator[Served]:
    """Draws with an adapter of `read_bans_but_hate`."""
    model = smallest_pipeline[1]
    adapter = saved(model, tmp_path_factory.mktemp("bits") / "a.safetensors", read_bans_but_hate)
    with serving(Studio(psa_jax.load(str(model.folder), adapter=adapter), {}, batch=4).draw) as running:
        yield running


@pytest.fixture(scope="session")
def pipe(smallest_pipeline, adapter_file) -> Pipeline:
    return psa_jax.load(str(smallest_pipeline[1].folder), adapter=adapter_file)


@pytest.fixture(scope="session")
def studio(pipe) -> Studio:
    return Studio(pipe, {}, batch=4)  # one program for all sets here


@pytest.fixture(scope="session")
def served(studio) -> Iterator[Served]:
    with serving(studio.draw) as running:
        yield running


@pytest.fixture(scope="session")
def served_open(studio) -> Iterator[Served]:
    """With --allow-unprotected."""
    with serving(studio.draw, allow_unprotected=True) as running:
        yield running
