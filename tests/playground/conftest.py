"""Servers that draw with a random adapter with the gate by categories, on the smallest model."""

from collections.abc import Iterator

import pytest
from support.playground_server import Served, serving
from support.torch_adapters import random_adapter

import psa_jax
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.pipeline import Pipeline
from psa_jax.playground.studio import Studio
from psa_jax.profiles.encoders import get_encoder


@pytest.fixture(scope="session")
def adapter_file(smallest_pipeline, tmp_path_factory):
    model, encoder = smallest_pipeline[1], get_encoder("features")
    sizes = {"kind": "edit", "gate": "categories", "tokens": 0}
    config = AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim, **sizes)
    about = {"base_model": model.base_hash, "encoder": encoder.name, "encoder_fingerprint": encoder.fingerprint}
    path = tmp_path_factory.mktemp("playground") / "a.safetensors"
    save_adapter(random_adapter(config), path, about)
    return path


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
