"""Held-out accuracy and loss: the same rows, noise and timesteps every time."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
import numpy as np

from psa_jax.data.pipeline import to_devices
from psa_jax.data.shards import Shards
from psa_jax.data.validation import validation_batches
from psa_jax.errors import PSAError
from psa_jax.interop.native import with_arrays
from psa_jax.preference.batch import Batch
from psa_jax.preference.draws import draw
from psa_jax.preference.metrics import part_means
from psa_jax.preference.pair_loss import pair_losses, summarise
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import by_rows
from psa_jax.training.state import Frozen, Metrics

_LOGGED = ("loss", "accuracy", "margin", "winner_gap", "loser_gap", "sum_swap_learnt", "pairs_")


class HeldOut:
    """Measures an adapter on held-out pairs.

    Args:
      setup: whose loss is measured, without dropout.
      batches: on the mesh's devices, all of one size and without rows that only fill up (`held_out_batches`), with what
        the training step takes; they are kept.
      key: of the random draws that are left, the VAE's noise: the same at every measurement.
    """

    def __init__(self, setup: Setup, batches: Iterable[Batch], key: Any):
        objective = dataclasses.replace(setup.objective, text_dropout=0.0, user_dropout=0.0)

        def measure(params: dict[str, Any], frozen: Frozen, batch: Batch, key: Any) -> Metrics:
            model, adapter = setup.frozen_model(frozen, remat="none"), with_arrays(setup.adapter, params)
            fixed = {"noise": batch["noise"], "timesteps": batch["timesteps"]}
            draws = draw(objective, model.schedule, batch, key)._replace(**fixed)
            losses = pair_losses(objective, adapter, model, batch, draws, None, frozen.swap_distance, compare=True)
            return {name: value for name, value in summarise(losses).items() if name.startswith(_LOGGED)}

        self._measure, self._batches, self._key = jax.jit(measure), list(batches), key

    def __call__(self, params: dict[str, Any], frozen: Frozen) -> dict[str, float]:
        """Means over all held-out pairs, as `held_out_<name>`; on the host.

        Args:
          params: the adapter's arrays.
        """
        found = jax.device_get([self._measure(params, frozen, batch, self._key) for batch in self._batches])
        means = part_means({name: float(np.mean([each[name] for each in found])) for name in found[0]})
        return {f"held_out_{name}": value for name, value in means.items() if not name.startswith("pairs_")}


def held_out_batches(
    setup: Setup, config: ml_collections.ConfigDict, shards: Shards, table: EmbeddingTable
) -> list[Batch]:
    """Full held-out batches of at most `validate.rows` rows, on device; an incomplete last batch is dropped.

    Args:
      shards: the held-out split.
      table: embeddings of its users.

    Raises:
      PSAError: fewer rows than a batch.
    """
    size = config.validate.batch_size
    rows = min(config.validate.rows, len(shards)) // size * size
    if not rows:
        more = " or raise validate.rows" if len(shards) >= size else ""
        raise PSAError(
            f"validate: {min(config.validate.rows, len(shards))} held-out rows do not fill a batch of {size}; "
            f"lower validate.batch_size{more}"
        )
    names = (*setup.batch.pair_columns, "noise", "timesteps")
    batches = validation_batches(
        shards,
        table,
        batch_size=size,
        seed=config.seed,
        rows=rows,
        timesteps=setup.schedule.steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        place=to_devices(by_rows(setup.mesh), names),
    )
    return list(batches)
