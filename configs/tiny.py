"""The embedded default: a real but tiny Stable Diffusion on SAGE-mini.

    psa-jax pretrain --config=configs/tiny.py --workdir=runs/tiny      # the base model and the oracle
    psa-jax train --config=configs/tiny.py --workdir=runs/adapter      # the adapter
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """No argument is needed: sizes and recipes below are the ones the shipped files were made with."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pretrain = _pretrain()
    return config.lock()


def _pretrain() -> ml_collections.ConfigDict:
    part = ml_collections.ConfigDict()
    part.pictures = 20_000
    part.held_out = 2_000
    part.samples = 400
    part.data_seed = 100
    part.text = dict(hidden_size=64, layers=2, heads=4, length=20)
    part.unet = dict(widths=(32, 64, 128), heads=4)
    part.vae = dict(
        widths=(16, 32, 64),
        kl_weight=1e-4,
        crops=dict(steps=1700, batch_size=32, size=32, learning_rate=3e-3, weight_decay=1e-4, seed=1),
        whole=dict(steps=200, batch_size=16, size=64, learning_rate=5e-4, weight_decay=1e-4, seed=2),
    )
    part.oracle = dict(
        steps=2500, batch_size=64, decoded=6000, learning_rate=2e-3, weight_decay=1e-3, ema=0.995, seed=3
    )
    part.denoiser = dict(
        steps=4000,
        batch_size=64,
        learning_rate=1.5e-3,
        weight_decay=1e-3,
        ema=0.998,
        min_snr=5.0,
        text_dropout=0.1,
        seed=4,
    )
    return part
