"""Held-out accuracy and loss: the same rows, noise and timesteps every time."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import with_arrays
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.preference.draws import Batch, draw
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import pair_losses, summarise
from psa_jax.training.step import Frozen, Metrics, opened

_LOGGED = ("loss", "accuracy", "margin", "winner_gap", "loser_gap")


class HeldOut:
    """Measures an adapter on held-out pairs.

    Args:
      batches: on the mesh's devices, all of one size and without rows that only fill up, as `validation_batches` makes
        them, with what the training step takes; they are kept.
    """

    def __init__(
        self,
        model: StableDiffusion,
        config: AdapterConfig,
        objective: Objective,
        mesh: Mesh,
        batches: Iterable[Batch],
        key: Any,
    ):
        base_of = opened(model, mesh)
        quiet = dataclasses.replace(objective, text_dropout=0.0, user_dropout=0.0)

        def measure(params: dict[str, Any], frozen: Frozen, batch: Batch, key: Any) -> Metrics:
            base, adapter = base_of(frozen), with_arrays(config, params)
            fixed = {"noise": batch["noise"], "timesteps": batch["timesteps"]}
            draws = draw(quiet, base.schedule, batch, key)._replace(**fixed)
            found = summarise(pair_losses(quiet, adapter, base, batch, draws))
            return {name: found[name] for name in _LOGGED if name in found}

        self._measure, self._batches, self._key = jax.jit(measure), list(batches), key

    def __call__(self, params: dict[str, Any], frozen: Frozen) -> Metrics:
        """Means over all held-out pairs, as `held_out_<name>`; on the device, not waited for."""
        found = [self._measure(params, frozen, batch, self._key) for batch in self._batches]
        return {f"held_out_{name}": jnp.mean(jnp.stack([each[name] for each in found])) for name in found[0]}
