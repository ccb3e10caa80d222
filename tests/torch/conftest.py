"""A pipeline, its adapters and a table."""

import pytest
from torch_adapters import random_adapter
from torch_runtime import ENCODER, open_pipeline

from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import KINDS, AdapterConfig
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable


@pytest.fixture
def pipe(sd1):
    return open_pipeline(sd1[0])


@pytest.fixture(scope="session")
def table() -> EmbeddingTable:
    return EmbeddingTable.from_profiles(sample_population(8), ENCODER)


@pytest.fixture(scope="session")
def files(small_pipeline, tmp_path_factory):
    """Kind -> adapter file of four tokens."""
    folder, unet = tmp_path_factory.mktemp("adapters"), small_pipeline[1].unet.config
    about = {
        "family": "sd1",
        "encoder": ENCODER.name,
        "encoder_fingerprint": ENCODER.fingerprint,
        "standardised": False,
    }
    for kind in KINDS:
        config = AdapterConfig.for_unet(unet, user_dim=ENCODER.dim, kind=kind)
        save_adapter(random_adapter(config), folder / f"{kind}.safetensors", about)
    return {kind: folder / f"{kind}.safetensors" for kind in KINDS}
