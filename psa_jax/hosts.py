"""Hosts that share a piece of work: which part is this one's."""

import os
from collections.abc import Mapping

from psa_jax.errors import PSAError

AUTO = "auto"
_COUNTED = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
)
"""Variables that hold a process's number, from 0, and how many there are: Open MPI, SLURM, SkyPilot. The first counts:
SLURM says the same to all that mpirun starts in one of its jobs."""

Part = tuple[int, int]
"""Number of a host, from 0, and how many there are."""


def part_of(host: int | None, hosts: int | str | None, environment: Mapping[str, str] = os.environ) -> Part | None:
    """The part that flags ask for; None where there is one host.

    Args:
      host: --host.
      hosts: --hosts: a number, or "auto" for what SLURM, Open MPI, SkyPilot or a TPU slice on GKE say.
      environment: of the process.

    Raises:
      PSAError: flags that do not go together, or "auto" where nothing says it.
    """
    if hosts == AUTO:
        if host is not None:
            raise PSAError("--hosts=auto finds --host by itself; leave --host out")
        return _found(environment)
    if (host is None) != (hosts is None):
        raise PSAError("--host=I and --hosts=N belong together; give both or neither")
    if host is not None and host >= int(hosts):
        raise PSAError(f"--host={host} of --hosts={hosts}: count from 0")
    return None if host is None else (host, int(hosts))


def _found(environment: Mapping[str, str]) -> Part:
    for number, count in _COUNTED:
        if environment.get(number, "").isdecimal() and environment.get(count, "").isdecimal():
            return _checked(int(environment[number]), int(environment[count]), number)
    names = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if names and environment.get("TPU_WORKER_ID", "").isdecimal():
        # Every slice has workers 0, 1, …
        slices, slice_ = (environment.get(f"MEGASCALE_{name}") for name in ("NUM_SLICES", "SLICE_ID"))
        number = int(environment["TPU_WORKER_ID"]) + len(names) * int(slice_ or 0)
        return _checked(number, len(names) * int(slices or 1), "TPU_WORKER_ID")
    known = ", ".join([*(number for number, _ in _COUNTED), "TPU_WORKER_ID"])
    raise PSAError(f"--hosts=auto: nothing here says which host this is ({known}); give --host=I and --hosts=N")


def _checked(number: int, count: int, name: str) -> Part:
    if number >= count:
        raise PSAError(f"--hosts=auto: {name} is {number}, and there are {count}; give --host=I and --hosts=N")
    return number, count
