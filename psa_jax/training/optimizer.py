"""Optimizers by configuration."""

import ml_collections
import optax

from psa_jax.errors import PSAError


def learning_rate(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant until the last `decay_share` of the steps, which fall to 0 on a cosine."""
    warm_up, decay = config.warmup_steps, int(config.decay_share * steps)
    if warm_up + decay > steps:
        raise PSAError(f"optimizer: {warm_up} warm-up and {decay} decay steps do not fit into {steps} steps")
    parts = [optax.constant_schedule(config.learning_rate)]
    ends = []
    if warm_up:
        parts.insert(0, optax.linear_schedule(0.0, config.learning_rate, warm_up))
        ends.append(warm_up)
    if decay:
        parts.append(optax.cosine_decay_schedule(config.learning_rate, decay))
        ends.append(steps - decay)
    return optax.join_schedules(parts, ends)


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate(config, steps), b2=config.b2, weight_decay=config.weight_decay),
    )
