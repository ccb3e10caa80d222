"""Checkpoints with Orbax: adapter, optimizer, step and the position in the data; never the frozen weights."""

from pathlib import Path
from typing import Any

import grain
import orbax.checkpoint as ocp

from psa_jax.errors import PSAError
from psa_jax.training.step import TrainState


class Checkpoints:
    """Saves and restores (state, data iterator) in `folder`; refuses one that another configuration wrote.

    Args:
      identity: JSON values that must be equal for a run to go on from a checkpoint (base model, adapter, data, loss).
    """

    def __init__(self, folder: Path, *, keep: int, identity: dict[str, Any]):
        self._folder, self._identity = folder, identity
        self._manager = ocp.CheckpointManager(folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def save(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Starts writing; the next save, or leaving the context, waits for it. Call before the next batch is drawn."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state._asdict()),
                # Grain's own item is a file for each process and cannot be read by another number of them.
                data=ocp.args.JsonSave(iterator.get_state()),
                identity=ocp.args.JsonSave(self._identity),
            ),
        )

    def restore(self, state: TrainState, iterator: grain.DatasetIterator) -> TrainState | None:
        """The latest state, with the iterator moved to its place; None where there is no checkpoint.

        Raises:
          PSAError: the checkpoint belongs to another run.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        saved = self._manager.restore(step, args=ocp.args.Composite(identity=ocp.args.JsonRestore())).identity
        different = sorted(k for k in saved.keys() | self._identity.keys() if saved.get(k) != self._identity.get(k))
        if different:
            name = different[0]
            raise PSAError(
                f"{self._folder}: checkpoint {step} was made with {name} = {saved.get(name)!r}, this run has "
                f"{self._identity.get(name)!r}; use another --workdir or the same settings"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(state._asdict()), data=ocp.args.JsonRestore()),
        )
        iterator.set_state(restored.data)
        return TrainState(**restored.state)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()
