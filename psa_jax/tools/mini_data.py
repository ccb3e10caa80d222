"""SAGE-mini made ready for training: pictures, shards and the users' embeddings in one folder."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from psa_jax.data.builder import build_shards, padded
from psa_jax.data.latents import Preprocess, fingerprint
from psa_jax.data.mini import draw_mini
from psa_jax.data.sage import SPLITS, read_split
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.table import EmbeddingTable


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
        preprocess = Preprocess(resolution)
        factor = model.vae.config.downscale
        graph, params = nnx.split(model.vae)
        encode = jax.jit(lambda params, images: nnx.merge(graph, params).encode(images))
        build_shards(
            folder / "sage",
            folder / "shards",
            encode=lambda images: np.asarray(encode(params, images)),
            vae_fingerprint=fingerprint(model.folder / "vae" / "diffusion_pytorch_model.safetensors", preprocess),
            latent_shape=(resolution // factor, resolution // factor, 2 * model.vae.config.latent_channels),
            tokenizer=padded(model.tokenizer),
            resolution=resolution,
            family=family,
            splits=splits,
            batch_size=batch_size,
        )
