"""A trained adapter and a command that must fail."""

import json
from collections.abc import Callable

import pytest
from support.torch_adapters import random_adapter

from psa_jax.cli import main
from psa_jax.interop.adapter_file import adapter_hash
from psa_jax.interop.native import save_adapter, to_file
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable


@pytest.fixture(scope="session")
def small_pipeline(smallest_pipeline):
    """In the tests of commands, which compile a sampler for most of them."""
    return smallest_pipeline


@pytest.fixture(scope="module")
def run_folder(small_pipeline, tmp_path_factory):
    """A run's folder with an adapter of one token and a report, and a table."""
    folder, model, encoder = tmp_path_factory.mktemp("run"), small_pipeline[1], get_encoder("features")
    config = AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim, kind="published", tokens=1)
    about = {
        "base_model": model.base_hash,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "steps": 7,
    }
    save_adapter(random_adapter(config), folder / "psa_adapter.safetensors", about)
    report = {
        "unseen": {"psa": {"selectivity": 12.34, "n": 9}, "psa_zeros": {"selectivity": 45.67, "n": 9}},
        "adapter": {"sha256": adapter_hash(to_file(random_adapter(config)), config)},
        "sampling": {"unconditional": "off", "guidance": 4.0, "steps": 12},
    }
    (folder / "report.json").write_text(json.dumps(report))
    EmbeddingTable.from_profiles(sample_population(3), encoder).save(folder / "table.safetensors")
    return model.folder, folder


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command that must end with exit code 1 and one line on stderr, which it returns."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return run
