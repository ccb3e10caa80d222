"""The small SAGE folder of `small_sage`, as files, shards and a table."""

from pathlib import Path

import pytest
from support.small_sage import BANS, BUILD, TWO_USERS, CountingEncoder, tokenize, write_rows, write_sage

from psa_jax.profiles.encoders import FeatureEncoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable


@pytest.fixture(scope="session")
def rewrite():
    return write_rows


@pytest.fixture(scope="session")
def bans() -> dict[str, set[str]]:
    """User id -> lower-case banned categories, for the users in `shard_dir`."""
    return BANS


@pytest.fixture
def sage_dir(tmp_path: Path) -> Path:
    write_sage(tmp_path / "sage", TWO_USERS)
    return tmp_path / "sage"


@pytest.fixture(scope="session")
def table() -> EmbeddingTable:
    users = sample_population(60)
    encoder = FeatureEncoder()
    ids = [user.user_id for user in users]
    return EmbeddingTable(ids, encoder.encode(users), encoder.name, encoder.fingerprint)


@pytest.fixture
def encode() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture(scope="session")
def tokenizer():
    return tokenize


@pytest.fixture(scope="session")
def build_options() -> dict:
    return BUILD | {"tokenizer": tokenize}


@pytest.fixture(scope="session")
def shard_dir(tmp_path_factory, build_options) -> Path:
    """Shards of 4 users, 112 rows; read only."""
    from psa_jax.data.build import build_shards

    root = tmp_path_factory.mktemp("shards")
    write_sage(root / "sage", BANS)
    return build_shards(root / "sage", root / "out", encode=CountingEncoder(), **build_options)
