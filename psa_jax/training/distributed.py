"""Distributed training: processes join a group, agree on values, and notice that one is gone."""

import contextlib
import functools
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from psa_jax.errors import PeerLost, PSAError
from psa_jax.progress import silence

# What says that this process is one of several; jax.distributed reads the rest of it by itself.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
# How jax and gloo word it when a process that they wait for is gone.
_GONE = re.compile(r"gloo|heartbeat|coordination ?service|barrier|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE)
_LONG = 24 * 3600  # seconds that one process may work while the others wait
_PARTING = 10  # seconds that a process which ends waits for others that end for the same reason


def is_distributed_env(environment: Mapping[str, str]) -> bool:
    """Whether the environment describes a group: a coordinator, several SLURM or Open MPI tasks, several TPU hosts."""
    counts = [environment.get(name, "") for name in _COUNTS]
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or any(count.isdecimal() and int(count) > 1 for count in counts)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the group that flags or environment (`is_distributed_env`) describe; without either, does nothing.

    Must be called before JAX is used.

    Args:
      coordinator: HOST:PORT of process 0; "auto" lets jax.distributed find all three (TPU pods, SLURM, Open MPI,
        Kubernetes).
      processes: their number.
      process: which this is, from 0.

    Raises:
      PSAError: flags that do not make a group.
      PeerLost: a group that does not come together.
    """
    if coordinator == "auto" or (coordinator is None and is_distributed_env(os.environ)):
        given = {"coordinator_address": None, "num_processes": processes, "process_id": process}
    elif None not in (coordinator, processes, process):
        given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
        if not re.fullmatch(r".+:\d+", coordinator):
            raise PSAError(f"--coordinator={coordinator}: give HOST:PORT of process 0, or auto")
        if not 0 <= process < processes:
            raise PSAError(f"--process-id={process} of --num-processes={processes}: count from 0")
    elif coordinator is processes is process is None:
        return
    else:
        raise PSAError("give --coordinator, --num-processes and --process-id together, or --coordinator=auto")
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        # Late or a port that was taken meanwhile is cured by another start; what is not described to JAX is not.
        kind = PeerLost if isinstance(error, RuntimeError) else PSAError
        raise kind(
            f"the processes did not meet ({first_line(error)}); is every one started, with one address?"
        ) from error
    if not is_main_process():
        silence()


def require_joined() -> None:
    """Raises PSAError on a TPU pod whose processes share devices but have not joined."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise PSAError(
            f"this is one of {jax.process_count()} hosts and they have not joined; run psa-jax train "
            "--coordinator=auto on all of them (no other command joins)"
        )


def is_main_process() -> bool:
    """Whether this is process 0, which alone prints and writes shared files."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all processes must call it."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def by_main_process(work: Callable[[], Any]) -> Any:
    """Runs the work in process 0, whose disk is the run's; all processes must call it.

    Args:
      work: returns a value of JSON.

    Returns:
      The value, in all processes.

    Raises:
      PSAError: the one of process 0, in all of them.
    """
    value, error = None, None
    if is_main_process():
        try:
            value = work()
        except PSAError as raised:
            error = raised
    if jax.process_count() > 1:
        said = json.dumps({"value": value, "error": None if error is None else str(error)}).encode()
        length = int(array_of_main_process(np.asarray(len(said), np.int32)))
        text = said if is_main_process() else bytes(length)
        told = json.loads(array_of_main_process(np.frombuffer(text, np.uint8)).tobytes())
        value = told["value"]
        if error is None and told["error"] is not None:
            raise PSAError(told["error"])
    if error is not None:
        raise error
    return value


def array_of_main_process(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The array of process 0 bit by bit; all processes must call it, with one shape and type.

    It is sent as bytes, since JAX sends by a sum, which would make a -0.0 of floats 0.0.
    """
    if jax.process_count() == 1:
        return array
    sent = multihost_utils.broadcast_one_to_all(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return np.asarray(sent).view(array.dtype).reshape(array.shape)


def in_global_order(rows: Shaped[np.ndarray, " b"]) -> list:
    """The values of all processes in the order of the whole batch; all processes must call it."""
    return multihost_utils.process_allgather(rows).ravel().tolist()


def wait_for_all(name: str) -> None:
    """Waits until all processes have arrived, for up to a day. Not a collective, which would time out sooner."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * _LONG)


@functools.cache  # for each mesh once
def connect(mesh: Mesh) -> None:
    """Runs a collective along each axis of a mesh, and along all; all processes must call it.

    On CPUs the first collective of a group of devices opens its connections, and fails if another process does not
    take part within 30 s; this limit cannot be set. Long work therefore comes after this call.
    """
    if jax.process_count() == 1:
        return
    wait_for_all("connect")
    names, every = mesh.axis_names, PartitionSpec(*mesh.axis_names)
    rest = [PartitionSpec(*(None if name == summed else name for name in names)) for summed in names]

    def sums(ones: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(ones, axes) for axes in (*names, names)]

    summed = jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=every, out_specs=[*rest, PartitionSpec()]))
    ones = jax.jit(lambda: jnp.ones(mesh.devices.shape), out_shardings=NamedSharding(mesh, every))()
    jax.block_until_ready(summed(ones))
    multihost_utils.sync_global_devices("connected")  # the group that checkpoints and flags go by


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """Process 0 runs the block first; the others wait, then run it and find its files."""
    if not is_main_process():
        wait_for_all(name)
    yield
    if is_main_process():
        wait_for_all(name)


def is_peer_lost(error: BaseException) -> bool:
    """Whether an error of JAX means that another process is gone."""
    return jax.process_count() > 1 and bool(_GONE.search(str(error)))


@contextlib.contextmanager
def lost_peers_named() -> Iterator[None]:
    """Converts JAX's errors about other processes to PeerLost."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, PSAError) or not is_peer_lost(error):
            raise
        raise PeerLost(
            f"process {jax.process_index()}: another process is gone ({first_line(error)}); "
            "start all of them again: they go on from the last checkpoint"
        ) from error


def hard_exit(code: int, error: BaseException | None = None, refused: bool = False) -> None:
    """Ends this process of a group at once; an orderly exit would wait for the others. Alone, it does nothing.

    Args:
      error: printed with its traceback.
      refused: whether the others will refuse the same (a wrong setting). Process 0 runs the service that connects them,
        and JAX aborts the others when it is gone: so that each can say what it refuses, process 0 then leaves last, if
        they end within seconds.
    """
    if jax.distributed.is_initialized():
        if error is not None:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if refused:
            _part()
        os._exit(code)


def _part() -> None:
    """Waits a few seconds for the other processes to end."""
    try:
        ocp.multihost.get_barrier_sync_fn()(key="part", timeout_ms=1000 * _PARTING)
    except RuntimeError:  # they go on, or are gone: there is nobody to wait for
        return
    if is_main_process():
        time.sleep(0.5)  # the others are between the barrier and their end


def first_line(error: BaseException) -> str:
    """The first line of an error's text, of at most 200 characters."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
