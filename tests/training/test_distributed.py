"""What makes a group of processes, and the loss of one of them."""

import pytest

from psa_jax.errors import PeerLost, PSAError, Stopped
from psa_jax.training import distributed
from psa_jax.training.distributed import is_distributed_env, join


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, False),
    ({"SLURM_NTASKS": "1"}, False),
    ({"SLURM_NTASKS": "4"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
    ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, True),
])  # fmt: skip
def test_what_an_environment_says(environment: dict[str, str], expected: bool):
    assert is_distributed_env(environment) is expected


def test_who_joins(monkeypatch):
    joined = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **options: joined.append(options))
    monkeypatch.setattr(distributed.os, "environ", {})
    join()
    assert not joined
    join("10.0.0.1:99", 2, 1)
    join("auto")
    assert joined == [
        {"coordinator_address": "10.0.0.1:99", "num_processes": 2, "process_id": 1},
        {"coordinator_address": None, "num_processes": None, "process_id": None},
    ]
    for wrong in (("10.0.0.1:99",), ("10.0.0.1:99", 2), (None, 2, 1), ("10.0.0.1", 2, 1), ("10.0.0.1:99", 2, 2)):
        with pytest.raises(PSAError, match="--coordinator|--process-id"):
            join(*wrong)


@pytest.mark.parametrize(("error", "again"), [(RuntimeError("DEADLINE_EXCEEDED"), True), (ValueError("no id"), False)])
def test_a_group_that_does_not_meet(monkeypatch, error: Exception, again: bool):
    """What comes too late is started again; what JAX cannot tell from the environment is not."""

    def initialize(**options):
        raise error

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(PSAError, match="the processes did not meet") as caught:
        join("auto")
    assert isinstance(caught.value, PeerLost) is again


def test_an_error_of_jax_about_others_is_named(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer\nmore")
    with pytest.raises(ValueError, match="Gloo") as caught, distributed.lost_peers_named():
        raise gone
    assert caught.value is gone  # alone there are no others
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    said = "another process is gone .*reset by peer.; start all"
    with pytest.raises(PeerLost, match=said), distributed.lost_peers_named():
        raise gone
    for other in (ValueError("shapes differ"), Stopped("stopped: barrier")):
        with pytest.raises(type(other)) as caught, distributed.lost_peers_named():
            raise other
        assert caught.value is other
