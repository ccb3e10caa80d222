"""Which part of shared work is this host's."""

import pytest

from psa_jax.errors import PSAError
from psa_jax.hosts import part_of

TPU = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}

MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("host", "hosts", "environment", "part"),
    [
        (None, None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, None),  # it has to be asked for
        (0, 1, {}, (0, 1)),
        (2, 3, {}, (2, 3)),
        (None, "auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        (None, "auto", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, (0, 2)),
        (None, "auto", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"} | MPI, (2, 8)),  # mpirun in a job of SLURM
        (None, "auto", {"SKYPILOT_NODE_RANK": "3", "SKYPILOT_NUM_NODES": "4"}, (3, 4)),
        (None, "auto", TPU, (1, 4)),
        (None, "auto", TPU | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, (5, 8)),
    ],
)
def test_parts(host, hosts, environment, part):
    assert part_of(host, hosts, environment) == part


@pytest.mark.parametrize(
    ("host", "hosts", "environment", "message"),
    [
        (0, None, {}, "belong together; give both or neither"),
        (None, 2, {}, "belong together; give both or neither"),
        (2, 2, {}, "--host=2 of --hosts=2: count from 0"),
        (0, "auto", {}, "leave --host out"),
        (None, "auto", {}, "nothing here says which host this is .*; give --host=I and --hosts=N"),
        (None, "auto", {"SLURM_PROCID": "0"}, "nothing here says"),
        (None, "auto", {"TPU_WORKER_HOSTNAMES": "a"}, "nothing here says"),
        (None, "auto", {"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, "SLURM_PROCID is 4, and there are 4"),
    ],
)
def test_parts_that_are_none(host, hosts, environment, message):
    with pytest.raises(PSAError, match=message):
        part_of(host, hosts, environment)
