"""`psa-jax train`: trains an adapter by a configuration, which may ask for SAGE-mini to be drawn first."""

import json
from pathlib import Path

import ml_collections

from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.tools.mini_data import prepare
from psa_jax.training.loop import train


def with_mini(config: ml_collections.ConfigDict, folder: Path) -> ml_collections.ConfigDict:
    """Where `data.mini.users` is set, makes SAGE-mini in `folder` and points the configuration at it."""
    if not config.data.mini.users:
        return config
    mini = config.data.mini
    prepare(folder, load_stable_diffusion(config.model), users=mini.users, seed=mini.seed, splits=("train",))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.shards, config.data.table = str(folder / "shards"), str(folder / "table.safetensors")
    return config


def run(config: ml_collections.ConfigDict, workdir: Path) -> int:
    """Trains; the last line names the adapter and the last metrics."""
    path = train(with_mini(config, workdir / "data"), workdir)
    last = json.loads((workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    print(json.dumps({"adapter": str(path), **last}))
    return 0
