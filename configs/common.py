"""What the configurations of the released Stable Diffusion models share. They are locked, and have three modes:

(none)    the adapter and the loss that proved personal: kind `text`, 4 user tokens, DPO with an SFT term on the winner
:paper    the published adapter and recipe (PSA, arXiv 2508.01151): one token, β 5000, no SFT term, 5,000 steps
:smoke    a few steps, to see that everything is in place

A step is worked on in `accumulate` parts, and `batch_size` must be a multiple of `accumulate` times the devices. Where
memory does not suffice: a larger `accumulate`, `remat` = full, or the frozen weights divided, with mesh.fsdp = N and
mesh.frozen = split.
"""

import dataclasses

import ml_collections

from psa_jax.preference.objective import Objective

MODES = ("", "paper", "smoke")


def adapter_config(arg: str, *, batch_size: int, optimizer: str, accumulate: int) -> ml_collections.ConfigDict:
    """The configuration in one mode.

    Args:
      arg: one of MODES.
      batch_size: pairs a step, over all devices.
      optimizer: of the published recipe.
      accumulate: parts in which a step works on them; batch_size must be a multiple of it times the devices.
    """
    if arg not in MODES:
        raise ValueError(f"there is no mode {arg!r} (only {', '.join(mode for mode in MODES if mode)})")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.model = ""  # base model: a folder in diffusers' layout, or a single file with tokenizer, model_config
    config.variant = config.vae = config.tokenizer = config.model_config = ""
    config.steps = 5000
    config.batch_size = batch_size
    config.log_every = 10
    config.checkpoint_every = 250
    config.keep_checkpoints = 3
    config.keep_best = 1  # of the checkpoints at whose step held-out accuracy was measured, too
    config.validate = dict(every=250, rows=512, batch_size=64)  # on a mesh, batch_size is a multiple of its devices
    config.alarm_window = 100
    config.hang_timeout = 1800.0  # seconds without a step; the first one compiles
    config.wandb = False
    config.sample_every = 0

    # --- how it is computed; changes speed and memory, and the result only as far as bfloat16 rounds
    config.mesh = dict(data=-1, fsdp=1, frozen="replicated")
    config.accumulate = accumulate
    config.remat = "projections"
    config.dtype = "bfloat16"

    # --- what is learnt, and from what
    config.adapter = dict(kind="text", tokens=4, qk_dim=ml_collections.config_dict.placeholder(int))
    config.objective = dataclasses.asdict(Objective(beta=5000.0, sft_weight=500.0))
    # draws > 0: so many (noise, timestep) draws for each pair, whose reference errors are found once and kept in folder
    # (default: in the workdir), which runs may share; a step then runs no reference
    config.reference = dict(draws=0, seed=0, folder="")
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        warmup_steps=500,
        schedule="cosine",
        decay_share=0.4,
        b2=0.999,
        weight_decay=1e-2,
        decayed="matrices",
        clip_norm=1.0,
        ema=0.0,
    )
    config.data = dict(shards="", table="", balance="users", safe_share=0.3, mini=dict(users=0, seed=0))

    if arg == "paper":
        config.adapter.kind, config.adapter.tokens = "published", 1
        config.objective.sft_weight, config.objective.text_dropout = 0.0, 0.2
        config.data.balance = "none"  # SAGE's rows as they are
        config.optimizer.update(name=optimizer, learning_rate=5e-6, schedule="constant", decay_share=0.0)
        config.optimizer.decayed = "all"  # as torch's optimizers do unless told otherwise
    elif arg == "smoke":
        config.steps, config.log_every, config.optimizer.warmup_steps = 3, 1, 1
        config.batch_size, config.accumulate, config.mesh.data = 1, 1, 1
        config.validate.every = 0
    return config.lock()
