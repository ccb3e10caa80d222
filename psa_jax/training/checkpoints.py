"""Checkpoints with Orbax: adapter, optimizer, step and the position in the data; never the frozen weights.

One checkpoint is a folder: `state/` (arrays, readable on any number of devices and processes) and `about/` (JSON: what
the run is, the position in the data, held-out accuracy, a checksum of the state). It appears whole or not at all.
"""

import contextlib
import dataclasses
import glob
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils.epath import gpath
from jaxtyping import Array, PyTree, Shaped, UInt32
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, LatestN, PreservationContext

from psa_jax.errors import PeerLost, PSAError
from psa_jax.paths import check_workdir
from psa_jax.progress import print_on_main
from psa_jax.renamed import renamed_keys
from psa_jax.training.distributed import (
    array_of_main_process,
    by_main_process,
    first_line,
    is_main_process,
    is_peer_lost,
)
from psa_jax.training.sharding import replicated
from psa_jax.training.state import TrainState


class Checkpoints:
    """Saves and restores (state, data iterator) in a folder; refuses a checkpoint of another configuration.

    All processes of a group call the same methods. Process 0 alone reads and writes the folder, which the others need
    not see: a checkpoint is of the adapter and its optimizer, and small. What goes wrong there is raised in all.

    Args:
      keep: how many of the latest stay.
      keep_best: how many stay because of their held-out accuracy.
      identity: JSON values that must be equal for a run to continue (base model, adapter, data, loss).
      renewed: converts the identity in a checkpoint, perhaps of an earlier version, to today's form.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_best: int = 0,
        identity: dict[str, Any],
        renewed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ):
        self._renewed = renewed
        self._folder, self._identity = folder.absolute(), _as_json(identity)
        self._held_out: dict[int, float] = {}
        self._saved: tuple[int, PyTree[jax.ShapeDtypeStruct]] | None = None  # the latest step and what its state is
        self._policy = AnyPreservationPolicy([LatestN(keep), _Best(keep_best, self._held_out)])
        by_main_process(self._open)

    def _open(self) -> None:
        check_workdir(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        self._manager = _Manager(
            as_it_is(self._folder),
            options=ocp.CheckpointManagerOptions(
                create=False,
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,  # a killed save leaves one
                multiprocessing_options=alone,
            ),
        )
        for step in self._manager.all_steps():
            with contextlib.suppress(OSError, ValueError, KeyError):  # restoring says what is damaged
                self._remember(step, self._about(step)["held_out"])

    def save(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator, held_out: float | None = None
    ) -> None:
        """Starts to write a checkpoint; the next save, `verify`, or the end of the context waits for it.

        Call it before the next batch is taken: the position in the data is saved too.

        Args:
          held_out: accuracy of this very state, if it was measured.

        Raises:
          PSAError: this one or the one before cannot be written.
        """
        arrays = jax.tree.map(_on_host, state._asdict())
        position = iterator.get_state()

        def write() -> None:
            about = {
                "identity": self._identity,
                # Grain's own item is a file for each process and cannot be read by another number of them.
                "data": position,
                "held_out": held_out,
                "checksum": _checksum(arrays),
            }
            self._remember(step, held_out)
            with self._failures_named():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(_as_json(about))
                    ),
                    force=True,
                )
            self._saved = step, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)

        by_main_process(write)

    def wait(self) -> None:
        """Waits until the latest save is on the disk.

        Raises:
          PSAError: it cannot be written.
        """
        by_main_process(self._wait)

    def _wait(self) -> None:
        with self._failures_named():
            self._manager.wait_until_finished()

    def verify(self) -> None:
        """Waits for the latest save and reads it back, on the host.

        Raises:
          PSAError: it cannot be written, or not be read.
        """
        by_main_process(self._verify)

    def _verify(self) -> None:
        if self._saved is None:
            return
        self._wait()
        step, shapes = self._saved
        try:
            self._read(step, shapes, self._about(step)["checksum"])
        except Exception as error:  # whatever makes a checkpoint useless
            raise PSAError(
                f"{self._folder}: checkpoint {step} was written and cannot be read back ({first_line(error)}); "
                "check the disk, or use a --workdir on another one"
            ) from error

    def _read(self, step: int, shapes: PyTree, checksum: int) -> PyTree[np.ndarray]:
        """Reads the arrays of a checkpoint to the host, which has room where a device may have none.

        Args:
          shapes: the tree that it should be, of anything with `shape` and `dtype`.

        Raises:
          ValueError: its checksum is another.
        """
        target = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), shapes)  # takes none
        found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
        if _checksum(found) != checksum:
            raise ValueError("its checksum is another")
        return found

    def restore(self, state: TrainState, iterator: grain.DatasetIterator) -> TrainState | None:
        """Restores the latest readable checkpoint and moves the iterator to its position.

        Args:
          state: says shapes, types and devices.

        Returns:
          The state; None where nothing was saved.

        Raises:
          PSAError: the checkpoint belongs to another run, or there are some and none can be read.
        """
        arrays: list[PyTree[np.ndarray]] = []  # in process 0

        def read() -> dict[str, Any] | None:
            found = self._restore(state._asdict())
            if found is None:
                return None
            position, tree = found
            arrays.append(tree)
            return {"position": position}

        said = by_main_process(read)
        if said is None:
            return None
        iterator.set_state(said["position"])
        like = state._asdict()
        return TrainState(**jax.tree.map(_on_devices, like, arrays[0] if arrays else like))

    def _restore(self, shapes: PyTree) -> tuple[Any, PyTree[np.ndarray]] | None:
        """The position in the data and the arrays of the latest readable checkpoint; None where there is none at all.

        What is damaged is set aside, so that the run can write these steps again.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                about = self._about(step)
                self._require_same_run(step, about["identity"])
                self._complete(step)
                restored = self._read(step, shapes, about["checksum"])
            except PSAError:
                raise
            except Exception as error:  # whatever a damaged file makes Orbax raise
                damaged[step] = first_line(error)
                continue
            self._set_aside(damaged, step)
            self._remove_surplus()
            return about["data"], restored
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise PSAError(
                f"{self._folder}: no checkpoint can be read ({reasons}); "
                "bring a whole one back or use another --workdir"
            )
        return None

    def _remove_surplus(self) -> None:
        """Deletes checkpoints that the policy does not keep: a kill right after a save leaves the one before them."""
        steps = [_Step(step) for step in sorted(self._manager.all_steps())]
        kept = self._policy.should_preserve(steps, context=PreservationContext())
        for info, keep in zip(steps, kept, strict=True):
            if not keep:
                self._manager.delete(info.step)

    def _complete(self, step: int) -> None:
        """Moves arrays to where Orbax looks for them: earlier versions did not where a path looked like a pattern.

        A process writes into a folder of its own, and those folders were then not found.
        """
        state = self._folder / str(step) / "state"
        parts = list(state.glob("ocdbt.process_*"))
        if len(parts) == 1 and not (state / "manifest.ocdbt").exists():
            shutil.copytree(parts[0] / "d", state / "d", dirs_exist_ok=True)
            shutil.copy(parts[0] / "manifest.ocdbt", state)  # last: with it the others count

    def _about(self, step: int) -> dict[str, Any]:
        """The JSON item."""
        return json.loads((self._folder / str(step) / "about" / "metadata").read_text(encoding="utf-8"))

    def _remember(self, step: int, held_out: float | None) -> None:
        self._held_out.pop(step, None)
        if held_out is not None:
            self._held_out[step] = held_out

    def _require_same_run(self, step: int, saved: dict[str, Any]) -> None:
        found = list(differences(self._renewed(renamed_keys(saved)), self._identity))
        if found:
            raise PSAError(
                f"{self._folder}: checkpoint {step} was made with {'; '.join(found)}; "
                "use another --workdir or the same settings"
            )

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        """Renames unreadable checkpoints."""
        for number, reason in damaged.items():
            aside = self._folder / f"damaged_{number}"
            print_on_main(
                f"{self._folder}: checkpoint {number} cannot be read ({reason}), now {aside.name}; going on from {step}"
            )
            self._held_out.pop(number, None)
            count = 1
            while aside.exists():
                count += 1
                aside = aside.with_name(f"damaged_{number}_{count}")
            (self._folder / str(number)).rename(aside)
        if damaged:
            self._manager.reload()

    @contextlib.contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if is_peer_lost(error):
                raise
            raise PSAError(
                f"{self._folder}: a checkpoint could not be written ({first_line(error)}); those before it are whole: "
                "make room and run again"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        """Waits for what is being written; after an error, in process 0 alone."""
        if kind is None:
            by_main_process(self._close)
        elif is_main_process() and not isinstance(error, PeerLost):
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._manager.close()

    def _close(self) -> None:
        with self._failures_named():
            self._manager.close()


def differences(saved: Any, ours: Any, name: str = "") -> Iterator[str]:
    """Yields a phrase for every value in which two JSON trees differ."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        for key in sorted(saved.keys() | ours.keys()):
            yield from differences(saved.get(key), ours.get(key), f"{name}.{key}" if name else key)
    elif saved != ours:
        yield f"{name} = {saved!r}, this run has {ours!r}"


class _AsItIs(gpath.PosixGPath):
    """A path that is no pattern. etils, which Orbax uses, passes the names of folders to glob as patterns."""

    def glob(self, pattern: str) -> Iterator["_AsItIs"]:
        return (self / name for name in glob.glob(pattern, root_dir=self))


def as_it_is(folder: Path) -> gpath.PosixGPath:
    """The folder as Orbax takes it, also with *, ? or [ in its name."""
    return _AsItIs(folder.absolute())


class _Manager(ocp.CheckpointManager):
    """A manager that never queries preemption: Orbax does so in threads, with past steps, and JAX counts every call."""

    def reached_preemption(self, step: int) -> bool:
        return False


class _Step(NamedTuple):
    """A checkpoint as a preservation policy sees it."""

    step: int


@dataclasses.dataclass(frozen=True)
class _Best:
    """Orbax's preservation policy for the checkpoints with the highest held-out accuracy, the later of equals."""

    count: int
    held_out: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        known = [info.step for info in checkpoints if info.step in self.held_out]
        best = sorted(known, key=lambda step: (self.held_out[step], step))[len(known) - min(self.count, len(known)) :]
        return [info.step in best for info in checkpoints]


def _on_host(leaf: Array) -> np.ndarray | None:
    """A copy of a whole array, in process 0; all processes call it, since its parts may be anywhere."""
    if not (leaf.is_fully_replicated or leaf.is_fully_addressable):
        leaf = jax.device_put(leaf, replicated(leaf.sharding.mesh))
    if not is_main_process():
        return None
    # A copy: the next step writes over the devices' arrays.
    return np.array(leaf.addressable_data(0) if leaf.is_fully_replicated else leaf)


def _on_devices(like: Array, found: Shaped[np.ndarray, "..."] | Array) -> Array:
    """An array that process 0 has, where `like` is; `found` of other processes says its shape and type alone."""
    whole = array_of_main_process(found if is_main_process() else np.empty(like.shape, like.dtype))
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: whole[index])


def _checksum(tree: PyTree[Array | np.ndarray]) -> int:
    """Σ bits · odd position over all arrays, mod 2³²: any one changed number changes it; no sharding does."""
    total = 0
    for leaf in jax.tree.leaves(tree):  # one after the other: what is read back need not fit beside what trains
        total = (31 * total + int(_weighted_bits(leaf))) % 2**32
    return total


@jax.jit
def _weighted_bits(leaf: Array) -> UInt32[Array, ""]:
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    position, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        position += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    return jnp.sum(bits * (position * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)


def _as_json(value: Any) -> Any:
    """The value as JSON reads it back: tuples become lists."""
    return json.loads(json.dumps(value))
