"""Optimizers by configuration: clipping, then AdamW, Adafactor or Lion, on a learning rate that warms up and falls."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax
from jaxtyping import Array, Float, PyTree

from psa_jax.errors import PSAError

Arrays = dict[str, Float[Array, "..."]]


def _cosine(peak: float, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, steps)


def _linear(peak: float, steps: int) -> optax.Schedule:
    return optax.linear_schedule(peak, 0.0, steps)


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule] | None] = {
    "constant": None,
    "cosine": _cosine,
    "linear": _linear,
}
"""How the learning rate falls to 0 over the last `decay_share` of the steps."""


def learning_rate(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, then constant until the last `decay_share` of the steps, which fall as `schedule` says.

    A share of 1 is everything after the warm-up.
    """
    fall = _choose(SCHEDULES, config.schedule, "schedule")
    warm_up, decay = config.warmup_steps, 0 if fall is None else int(config.decay_share * steps)
    if config.decay_share == 1.0:
        decay = min(decay, steps - warm_up)
    if decay < 0 or warm_up + decay > steps:
        raise PSAError(f"optimizer: {warm_up} warm-up and {decay} decay steps do not fit into {steps} steps")
    parts = [optax.constant_schedule(config.learning_rate)]
    ends = []
    if warm_up:
        parts.insert(0, optax.linear_schedule(0.0, config.learning_rate, warm_up))
        ends.append(warm_up)
    if decay:
        parts.append(fall(config.learning_rate, decay))
        ends.append(steps - decay)
    return optax.join_schedules(parts, ends)


def learning_rate_at(config: ml_collections.ConfigDict, steps: int, step: int) -> float:
    """The learning rate of one step, to log it.

    Args:
      config, steps: as for `learning_rate`.
      step: number of steps before it.
    """
    with jax.numpy_dtype_promotion("standard"):  # optax mixes Python floats and int32 counters
        return float(learning_rate(config, steps)(step))


def matrices(arrays: PyTree) -> PyTree[bool]:
    """Mask of weight decay: projections, not biases and not the scales of norms."""
    return jax.tree.map(lambda array: array.ndim >= 2, arrays)


DECAYED = {"all": None, "matrices": matrices}
"""Choices for the parameters that weight decay applies to."""


def _adamw(config: ml_collections.ConfigDict, rate: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=config.b2, weight_decay=config.weight_decay, mask=mask)


def _lion(config: ml_collections.ConfigDict, rate: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.lion(rate, b2=config.b2, weight_decay=config.weight_decay, mask=mask)


def _adafactor(config: ml_collections.ConfigDict, rate: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    """Adafactor without momentum or scaling by parameter size, which would hold back parameters that start at 0.

    Not optax.adafactor: it adds the decay after the learning rate, which would shrink a parameter by wd a step.
    """
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion}


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer.

    Args:
      config: `name` (a key of OPTIMIZERS), `learning_rate`, `warmup_steps`, `schedule` and `decay_share`
        (`learning_rate`), `b2` (not for Adafactor), `weight_decay` and `decayed` (a key of DECAYED), `clip_norm`.
      steps: of the whole training.
    """
    if not config.clip_norm > 0:
        raise PSAError(f"optimizer.clip_norm = {config.clip_norm}; give a norm above 0, a large one for no clipping")
    make = _choose(OPTIMIZERS, config.name, "name")
    mask = _choose(DECAYED, config.decayed, "decayed")
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), make(config, learning_rate(config, steps), mask))


def moving_average(average: Arrays, arrays: Arrays, decay: float) -> Arrays:
    """a ← a + (1 − decay)·(p − a): the exponential moving average of the adapter."""
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, arrays)


def _choose(table: dict[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise PSAError(f"optimizer.{key} = {name!r} is unknown; use one of {', '.join(table)}")
    return table[name]
