"""A pipeline, its adapters and a table."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from support.torch_adapters import random_adapter
from support.torch_runtime import ENCODER, open_pipeline

from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import ADAPTER_KINDS, AdapterConfig
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.torch.processors import cross_attentions


@pytest.fixture
def pipe(sd1):
    return open_pipeline(sd1[0])


@pytest.fixture(scope="session")
def table() -> EmbeddingTable:
    return EmbeddingTable.from_profiles(sample_population(8), ENCODER)


@pytest.fixture(scope="session")
def files(small_pipeline, tmp_path_factory):
    """Kind -> adapter file of four tokens; `gates` is an `edit` with the gate by categories."""
    folder, unet = tmp_path_factory.mktemp("adapters"), small_pipeline[1].unet.config
    about = {
        "family": "sd1",
        "encoder": ENCODER.name,
        "encoder_fingerprint": ENCODER.fingerprint,
        "standardised": False,
    }
    sizes = {kind: {"kind": kind} for kind in ADAPTER_KINDS}
    sizes["gates"] = {"kind": "edit", "gate": "categories", "tokens": 0}
    for name, size in sizes.items():
        config = AdapterConfig.for_unet(unet, user_dim=ENCODER.dim, **size)
        save_adapter(random_adapter(config), folder / f"{name}.safetensors", about)
    return {name: folder / f"{name}.safetensors" for name in sizes}


@pytest.fixture(scope="module")
def one_thread():
    """Layers are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models(sd1, sdxl, files, tmp_path_factory):
    """Family -> a pipeline to copy, and its adapter file."""
    folder, pipe = tmp_path_factory.mktemp("xl"), open_pipeline(sdxl[0], StableDiffusionXLPipeline)
    layers = tuple((a.inner_dim, a.heads) for a in cross_attentions(pipe.unet).values())
    config = AdapterConfig("text", 4, ENCODER.dim, pipe.unet.config.cross_attention_dim, layers)
    save_adapter(random_adapter(config), folder / "a.safetensors", {"family": "sdxl"})
    sd = open_pipeline(sd1[0])
    return {"text": (sd, files["text"]), "prompt": (sd, files["prompt"]), "sdxl": (pipe, folder / "a.safetensors")}
