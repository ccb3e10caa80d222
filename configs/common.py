"""What all shipped configurations share, and the configuration of the released Stable Diffusion models.

`experiment_config` has four modes:

(none)    the adapter and the loss that drew the cleanest pictures in the small world: kind `edit` with the gate by
          categories, by swap distillation; and a self-attention over the prompt, which was not measured there
:dpo      kind `text`, 4 user tokens, DPO with an SFT term on the winner
:paper    the published adapter and recipe (PSA, arXiv 2508.01151): one token, β 5000, no SFT term, 5,000 steps
:debug    ten steps of one pair, with everything that a run does on its way: a metric of every step, held-out measures,
          checkpoints and the adapter; in float32, so that what is not finite is no matter of rounding
:smoke    three steps of one pair, to test an installation

Where memory is short: raise `accumulate`, which computes a step in that many parts (`batch_size` must be a multiple of
it times the number of devices); set `remat` to full; or shard the frozen weights with mesh.fsdp = N and
mesh.frozen = split.
"""

import dataclasses

import ml_collections

from psa_jax.preference.objective import Objective

MODES = ("", "dpo", "paper", "debug", "smoke")


def base_config(objective: Objective) -> ml_collections.ConfigDict:
    """Every key of a training configuration with the value that most configurations have. Not locked.

    Args:
      objective: the loss.
    """
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = ""  # a folder in diffusers' layout, a single file (with tokenizer, model_config), or tiny
    config.variant = config.vae = config.tokenizer = config.model_config = ""
    config.init_from = ""  # an adapter file of the same kind and sizes to start from; empty: an untrained adapter
    config.steps = 5000
    config.batch_size = 1  # pairs per step, over all devices
    config.log_every = 10
    config.checkpoint_every = 250
    config.keep_checkpoints = 3
    config.keep_best = 1  # checkpoints with the highest held-out accuracy that are kept as well
    # Held-out accuracy every so many steps, 0: never. Best a multiple of checkpoint_every. batch_size must be a
    # multiple of the number of devices.
    config.validate = dict(every=250, rows=512, batch_size=64)
    config.alarm_window = 100  # steps over which the alarm winner_worse averages
    config.hang_timeout = 1800.0  # seconds without a finished step, compiling included; 0: wait forever
    config.wandb = False
    config.sample_every = 0  # sample grids every so many steps; 0: never

    # --- how a step is computed: changes speed and memory, and the result only by rounding
    config.mesh = dict(data=-1, fsdp=1, frozen="replicated", slices=1)
    config.accumulate = 1
    config.remat = "projections"
    config.dtype = "bfloat16"

    # --- what is learned, and from what
    widths = {name: ml_collections.config_dict.placeholder(int) for name in ("qk_dim", "hidden")}
    config.adapter = dict(kind="text", tokens=4, **widths, gate="attention", mixing=False, pooled=False)
    config.objective = dataclasses.asdict(objective)
    # draws > 0: each pair has this many fixed draws of noise and timestep. Their reference errors are computed once and
    # stored in folder (default: in the workdir), which runs may share; a training step then runs no reference model.
    config.reference = dict(draws=0, seed=0, folder="")
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        warmup_steps=500,
        schedule="cosine",
        decay_share=0.4,  # the last part of the steps, over which the learning rate falls to 0
        b2=0.999,
        weight_decay=1e-2,
        decayed="matrices",
        clip_norm=1.0,
        ema=0.0,
    )
    # Of the examples: how many have a safe prompt, and how many of the others a user who bans their category.
    mixture = dict(balance="users", safe_share=0.3, banned_share=0.5)
    config.data = dict(shards="", table="", **mixture, mini=dict(users=0, seed=0))
    return config


def edit_by_swap(config: ml_collections.ConfigDict) -> None:
    """Sets an edit of the text states behind the gate by categories, and swap distillation alone."""
    config.adapter.update(kind="edit", tokens=0, gate="categories")
    config.objective.update(loss="none", sft_weight=0.0, swap_weight=2.0)
    # The gate is fitted before: only what a user bans teaches the edit anything.
    config.data.update(safe_share=0.05, banned_share=0.9)


def experiment_config(
    arg: str, *, batch_size: int, optimizer: str, accumulate: int, pooled: bool = False
) -> ml_collections.ConfigDict:
    """The configuration of a released model in one mode, locked.

    Args:
      arg: one of MODES.
      batch_size: pairs per step, over all devices.
      optimizer: of the published recipe.
      accumulate: parts in which a step is computed; batch_size must be a multiple of it times the number of devices.
      pooled: whether the base model takes a pooled text, which the default adapter then edits as well.

    Raises:
      ValueError: there is no such mode.
    """
    if arg not in MODES:
        raise ValueError(f"there is no mode {arg!r} (only {', '.join(mode for mode in MODES if mode)})")
    config = base_config(Objective(beta=5000.0, sft_weight=500.0))
    config.batch_size, config.accumulate = batch_size, accumulate
    if arg in ("", "debug", "smoke"):
        edit_by_swap(config)
        # Captions of SAGE's pairs are free paraphrases: a word's edit depends on the others.
        config.adapter.mixing, config.adapter.pooled = True, pooled
    if arg == "paper":
        config.adapter.kind, config.adapter.tokens = "published", 1
        config.objective.sft_weight, config.objective.text_dropout = 0.0, 0.2
        config.data.balance = "none"  # SAGE's rows as they are
        config.optimizer.update(name=optimizer, learning_rate=5e-6, schedule="constant", decay_share=0.0)
        config.optimizer.decayed = "all"  # the default of torch's optimizers
    elif arg == "smoke":
        config.steps, config.log_every, config.optimizer.warmup_steps = 3, 1, 1
        config.batch_size, config.accumulate, config.mesh.data = 1, 1, 1
        config.validate.every = 0
    elif arg == "debug":
        debug(config)
    return config.lock()


def debug(config: ml_collections.ConfigDict) -> None:
    """Sets ten steps of one pair in which everything happens that happens in a run, on one device."""
    config.steps, config.batch_size, config.accumulate, config.mesh.data = 10, 1, 1, 1
    config.log_every, config.checkpoint_every, config.keep_checkpoints = 1, 5, 1
    config.validate.update(every=5, rows=8, batch_size=8)
    config.optimizer.warmup_steps, config.dtype, config.hang_timeout = 2, "float32", 600.0
