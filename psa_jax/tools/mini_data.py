"""SAGE-mini made ready for training: pictures, shards and the users' embeddings in one folder."""

from pathlib import Path

import jax

from psa_jax.data.mini import draw_mini
from psa_jax.data.sage import SPLITS, read_split
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.tools.build import build


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
    """Fills `folder` with `sage/`, `shards/` and `table.safetensors`; what is there already stays."""
    if not (folder / "sage").exists():
        folder.mkdir(parents=True, exist_ok=True)
        draw_mini(folder / "sage", users, seed)
    if not (folder / "table.safetensors").exists():
        profiles = {r.user_id: r.profile for split in SPLITS for r in read_split(folder / "sage", split)}
        rows = [profiles[user] for user in sorted(profiles)]
        EmbeddingTable.from_profiles(rows, get_encoder(encoder)).save(folder / "table.safetensors")
    if not (folder / "shards").exists():
        build(
            model,
            folder / "sage",
            folder / "shards",
            resolution=resolution,
            family=family,
            splits=splits,
            batch_size=batch_size,
            devices=jax.local_devices()[:1],  # the pictures are few and small
        )
