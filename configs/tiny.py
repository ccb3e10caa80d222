"""The embedded default: a real but tiny Stable Diffusion on SAGE-mini, and the personal adapter for it.

psa-jax train --config=configs/tiny.py --workdir=runs/adapter      # the adapter; renders SAGE-mini first
psa-jax train --config=configs/tiny.py:dpo --workdir=runs/dpo      # the kind `text` by preference learning
psa-jax pretrain --config=configs/tiny.py --workdir=runs/tiny      # the shipped base model and oracle
"""

import ml_collections

from psa_jax.preference.objective import Objective

from . import common

MODES = ("", "dpo", "debug", "smoke", "dpo-smoke")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration in one of MODES.

    (none)       the kind `edit` with the gate by categories, by swap distillation
    :dpo         the kind `text` by Diffusion-DPO, as earlier versions had it
    :debug       ten steps of one pair, with everything that a run does on its way
    :smoke, :dpo-smoke    a few seconds of training, for tests

    Raises:
      ValueError: there is no such mode.
    """
    if arg not in MODES:
        raise ValueError(f"configs/tiny.py has no mode {arg!r} (only {', '.join(mode for mode in MODES if mode)})")
    config = common.base_config(Objective())
    config.model = "tiny"
    config.batch_size = 16
    config.keep_checkpoints = 2
    config.validate = dict(every=0, rows=256, batch_size=16)
    config.hang_timeout = 600.0
    config.mesh.data = 1
    config.remat, config.dtype = "none", "float32"
    config.optimizer.update(learning_rate=3e-3, warmup_steps=20, decay_share=0.6, b2=0.99, decayed="all")
    config.data.mini.update(users=100, seed=1)
    config.evaluate = dict(
        per_rate=dict(unseen=120, seen=18, harder=16), steps=12, guidance=4.0, unconditional="off", batch_size=54
    )
    (_dpo if arg.startswith("dpo") else _swap)(config)
    config.pretrain = _pretrain()
    if arg == "debug":
        common.debug(config)
    if arg.endswith("smoke"):
        config.steps, config.batch_size, config.data.mini.users = 4, 4, 40
        config.optimizer.warmup_steps = 1
        config.evaluate.per_rate.update(unseen=7, seen=7, harder=0)
        config.evaluate.steps, config.evaluate.batch_size = 2, 21
    return config.lock()


def _swap(config: ml_collections.ConfigDict) -> None:
    """Swap distillation of an edit of the text states."""
    config.steps, config.checkpoint_every = 800, 200
    common.edit_by_swap(config)


def _dpo(config: ml_collections.ConfigDict) -> None:
    """Preference learning of the kind `text`."""
    # β: the errors of a pair's images differ by at most 0.1. At β = 60 the loss still has a slope when a third of that
    # is learned; at 200 it has none. The SFT term is strong, so that the winner is learned and the loser is not only
    # unlearned. Timesteps come from the middle of the schedule, where the prompt changes the prediction most. There is
    # no dropout: with `unconditional="off"` the adapter never sees the empty prompt or the zero user.
    config.steps, config.checkpoint_every = 540, 180
    config.adapter.tokens = 8
    config.objective.update(beta=60.0, sft_weight=36.0, timestep_low=0.2, timestep_high=0.8)


def _pretrain() -> ml_collections.ConfigDict:
    part = ml_collections.ConfigDict()
    part.start = ""  # an earlier base model to go on from: its VAE is kept, and only `restart` is run
    part.pictures = 16_000
    part.held_out = 2_000
    part.samples = 400
    part.data_seed = 100
    part.text = dict(hidden_size=64, layers=2, heads=4, length=20)
    part.unet = dict(widths=(32, 64, 128), heads=4)
    part.vae = dict(
        widths=(16, 32, 64),
        kl_weight=5e-4,
        crops=dict(steps=600, batch_size=32, size=32, learning_rate=3e-3, weight_decay=1e-4, seed=1),
        whole=dict(steps=60, batch_size=16, size=64, learning_rate=5e-4, weight_decay=1e-4, seed=2),
    )
    part.oracle = dict(
        steps=1100, batch_size=64, decoded=3000, learning_rate=2e-3, weight_decay=1e-3, ema=0.995, seed=3
    )
    part.min_snr, part.text_dropout = 5.0, 0.1
    part.denoiser = dict(steps=5000, batch_size=32, learning_rate=2e-3, weight_decay=1e-3, ema=0.998, seed=4)
    part.restart = dict(steps=3000, batch_size=32, learning_rate=1.5e-3, weight_decay=1e-3, ema=0.998, seed=5)
    return part
