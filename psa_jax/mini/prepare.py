"""SAGE-mini prepared for training: pictures, shards and the users' embeddings in one folder."""

from pathlib import Path

import jax
import ml_collections

from psa_jax.data.model_shards import build_for_model
from psa_jax.data.rows import SPLITS
from psa_jax.data.sage import read_split
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.mini.dataset import render_mini
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.remote import locked
from psa_jax.training.distributed import leader_first


def prepare(
    folder: Path,
    model: StableDiffusion,
    *,
    users: int,
    seed: int,
    encoder: str = "features",
    resolution: int = 64,
    family: str = "tiny",
    splits: tuple[str, ...] = SPLITS,
    batch_size: int = 64,
) -> None:
    """Makes `sage/`, `shards/` and `table.safetensors` in a folder; those that exist already are kept.

    Args:
      folder: where; made if it is missing.
      model: the base model that training will use.
      users: number of train users.
      seed: of SAGE-mini's scenes and captions.
      encoder: of the profiles, a key of `ENCODERS`.
      resolution: side of the pictures in the shards, in pixels.
      family: model family, part of the data set's name.
      splits: those that get shards.
      batch_size: pictures encoded in one call.
    """
    if not (folder / "sage").exists():
        folder.mkdir(parents=True, exist_ok=True)
        render_mini(folder / "sage", users, seed)
    if not (folder / "table.safetensors").exists():
        profiles = {r.user_id: r.profile for split in SPLITS for r in read_split(folder / "sage", split)}
        rows = [profiles[user] for user in sorted(profiles)]
        EmbeddingTable.from_profiles(rows, get_encoder(encoder)).save(folder / "table.safetensors")
    if not (folder / "shards").exists():
        build_for_model(
            model,
            folder / "sage",
            folder / "shards",
            resolution=resolution,
            family=family,
            splits=splits,
            batch_size=batch_size,
            devices=jax.local_devices()[:1],  # the pictures are few and small
        )


def with_mini(config: ml_collections.ConfigDict, folder: Path) -> ml_collections.ConfigDict:
    """Renders SAGE-mini if a configuration asks for it (`data.mini.users`) and names no data of its own.

    All processes of a group call it. Process 0 writes the files; on a machine that does not see them, one process
    draws the same.

    Args:
      config: a training configuration.
      folder: where `prepare` puts the data; files that exist are used as they are.

    Returns:
      The configuration with the folder's shards and table as its data, or `config` itself.
    """
    if not config.data.mini.users or config.data.shards or config.data.table:
        return config
    mini = config.data.mini
    splits = ("train", "val") if config.validate.every or config.sample_every else ("train",)
    folder.mkdir(parents=True, exist_ok=True)
    with leader_first("data"), locked(folder / ".lock"):  # processes of another machine, which find nothing there
        prepare(folder, BaseModel.from_config(config).load(), users=mini.users, seed=mini.seed, splits=splits)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.shards, config.data.table = str(folder / "shards"), str(folder / "table.safetensors")
    return config
