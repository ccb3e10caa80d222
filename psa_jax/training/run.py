"""A training run before its first step: data, base model, set-up, and the identity of the run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

import psa_jax
from psa_jax.data.fingerprints import text_fingerprint, vae_fingerprint
from psa_jax.data.pipeline import make_pipeline, to_devices
from psa_jax.data.shards import Shards, open_shards, preprocess_of, read_empty_prompt, read_info
from psa_jax.errors import PSAError
from psa_jax.interop.base_model import BaseModel
from psa_jax.models.adapter_config import ADDED_SIZES
from psa_jax.preference.batch import Batch
from psa_jax.preference.objective import Objective
from psa_jax.profiles.table import OWN_BANS_NOTE, EmbeddingTable
from psa_jax.progress import print_on_main, print_stage
from psa_jax.training.distributed import connect, require_joined
from psa_jax.training.held_out import HeldOut, held_out_batches
from psa_jax.training.settings import validate, validate_devices
from psa_jax.training.setup import TEXT_ENCODERS, Setup
from psa_jax.training.sharding import by_rows
from psa_jax.training.state import Frozen


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training run that is ready for its first step.

    Attributes:
      config, workdir: as given.
      setup: of the training step.
      frozen: the frozen arrays, without reference errors.
      info: of the shards (`read_info`).
      shards: the rows to train on.
      table: embeddings of their users.
      iterator: of the batches; `rows` of each are the row numbers on the host, for error reports.
      shared: the shared columns of a batch.
      key: of the run.
      held_out: measures on held-out rows; None where it is not asked for.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    setup: Setup
    frozen: Frozen
    info: dict[str, Any]
    shards: Shards
    table: EmbeddingTable
    iterator: Any
    shared: Batch
    key: jax.Array
    held_out: HeldOut | None

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that must be equal for a run to continue from a checkpoint."""
        config, objective = self.config, dataclasses.asdict(self.setup.objective)
        return {
            "base_model": self.setup.model.base_hash,
            "shards": self.info["inputs"],
            "encoder": self.table.fingerprint,
            "objective": objective,
            "adapter": ADDED_SIZES | config.adapter.to_dict(),
            "optimizer": config.optimizer.to_dict(),
            "order": {
                **{name: config.data[name] for name in ("balance", "safe_share")},
                "banned_share": config.data.get("banned_share", 0.5),
            },
            "reference": {name: config.reference[name] for name in ("draws", "seed")},
            **{name: config[name] for name in ("seed", "batch_size", "steps", "dtype")},
            **({"text": self.info["text_fingerprint"]} if self.setup.cached_text else {}),
        }

    def renewed_identity(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The identity in a checkpoint, perhaps of an earlier version, as it is written today."""
        model = self.setup.model
        # A field that the objective did not have then acts as its default, which changes nothing.
        defaults = dataclasses.asdict(Objective())
        renewed = saved | {
            "objective": defaults | saved.get("objective", {}),
            "adapter": ADDED_SIZES | saved.get("adapter", {}),
            "order": {"banned_share": 0.5} | saved.get("order", {}),
        }
        # Earlier versions knew the base model by the bytes of its files.
        return renewed | ({"base_model": model.base_hash} if model.is_base_of(saved) else {})

    def adapter_metadata(self, steps: int) -> dict[str, Any]:
        """Metadata of the adapter file: base model, encoder, recipe, versions.

        Args:
          steps: that the adapter was trained for.
        """
        config, table = self.config, self.table
        return {
            "base_model": self.setup.model.base_hash,
            "family": self.setup.model.family,
            "encoder": table.encoder,
            "encoder_fingerprint": table.fingerprint,
            "standardised": table.mean is not None,
            "own_bans": OWN_BANS_NOTE in table.notes,
            "objective": config.objective.to_dict(),
            "ema": config.optimizer.ema,
            "dtype": config.dtype,
            "steps": steps,
            "seed": config.seed,
            "versions": {"psa_jax": psa_jax.__version__, "jax": jax.__version__},
        }


def prepare_run(config: ml_collections.ConfigDict, workdir: Path) -> Run:
    """Checks a configuration, opens the data, reads the base model. All processes of a group call it.

    Raises:
      PSAError: the first mistake; what can be wrong with the data is said before the weights are read.
    """
    validate(config, "train", workdir)
    require_joined()
    connect(validate_devices(config))
    folder, table = Path(config.data.shards), EmbeddingTable.load(Path(config.data.table))
    info = read_info(folder)
    for split in ("train", *(["val"] if config.validate.every or config.sample_every else [])):
        if split not in info["splits"]:
            raise PSAError(f"{folder}: no split {split!r} in the shards; they have {', '.join(sorted(info['splits']))}")
    print_stage(f"reading the base model {config.model}")
    text = cached_text(config, info)
    # Samples take the whole pipeline; a step decodes nothing, and encodes no text that is cached.
    unused = () if config.sample_every else ("vae", *(TEXT_ENCODERS if text else ()))
    setup = Setup.from_config(
        config, user_dim=table.dim, flips=info["flips"], cached_text=text is not None, abstract=unused
    )
    vae = vae_fingerprint(setup.model.vae_tensors, preprocess_of(info))
    shards = open_shards(folder, "train", vae)
    shared, key = setup.shared_arrays(text), setup.key(config.seed)
    held_out = None
    if config.validate.every:
        batches = held_out_batches(setup, config, open_shards(folder, "val", vae), table)
        held_out = HeldOut(setup, [batch | shared for batch in batches], key)
    return Run(
        config=config,
        workdir=workdir,
        setup=setup,
        frozen=setup.frozen(),
        info=info,
        shards=shards,
        table=table,
        iterator=_batches(config, setup, shards, table, info["flips"]),
        shared=shared,
        key=key,
        held_out=held_out,
    )


def cached_text(config: ml_collections.ConfigDict, info: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The empty prompt's text states where the shards hold those of their prompts; None where they do not.

    The text encoders are read to compare them, in float32 as when the shards were built, and let go.

    Args:
      config: names the base model.
      info: of the shards.

    Returns:
      `empty_states` [s, c] and, for SDXL, `empty_pooled` [p], in float16.

    Raises:
      PSAError: shards whose text was encoded by other text encoders.
    """
    if not info["text"]:
        return None
    if "text_fingerprint" not in info:
        print_on_main(
            "the shards' text embeddings are not used: they do not say which text encoders made them; build the shards "
            "again with --text-embeddings to train without a text encoder"
        )
        return None
    model = BaseModel.from_config(config).load(abstract=("unet", "vae"))
    found = text_fingerprint(model.text_encoders)
    if found != info["text_fingerprint"]:
        raise PSAError(
            f"{config.data.shards}: the text embeddings are of text encoders {info['text_fingerprint'][:12]}, those of "
            f"{config.model} are {found[:12]}; build the shards again with this model, or without --text-embeddings"
        )
    empty = read_empty_prompt(Path(config.data.shards))
    # float16 as the rows have it; reading made it float32.
    return {name.replace("text_", "empty_"): array.astype(np.float16) for name, array in empty.items()}


def _batches(config: ml_collections.ConfigDict, setup: Setup, shards: Shards, table: EmbeddingTable, flips: bool):
    """The iterator over training batches, on their devices but for `rows`."""
    place = to_devices(by_rows(setup.mesh), tuple(setup.batch.pair_columns))

    def with_rows(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return place(batch) | {"rows": batch["row"]}

    pipeline = make_pipeline(
        shards,
        table,
        batch_size=config.batch_size,
        seed=config.seed,
        balance=config.data.balance,
        safe_share=config.data.safe_share,
        banned_share=config.data.get("banned_share", 0.5),
        flips=flips,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        place=with_rows,
    )
    return iter(pipeline)
