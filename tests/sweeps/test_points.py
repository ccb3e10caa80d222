"""The state of a point, by the files that a training leaves."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import FORMAT
from psa_jax.sweeps.points import latest_checkpoint, state_of
from psa_jax.tools.configs import read_config


def config(*overrides):
    return read_config("tiny:dpo-smoke", overrides)


def leave(folder, *, adapter: int | None = None, checkpoints=(), nonfinite=False, **changed) -> None:
    """A run's files: its configuration, an adapter of so many steps, checkpoints."""
    found = json.loads(config().to_json_best_effort())
    found["data"] |= changed
    (folder / "config.json").write_text(json.dumps(found))
    if adapter is not None:
        about = json.dumps({"format": FORMAT, "steps": adapter})
        save_file({"x": np.zeros(1, np.float32)}, folder / "psa_adapter.safetensors", {"psa": about})
    for step in checkpoints:
        (folder / "checkpoints" / step).mkdir(parents=True)
    if nonfinite:
        (folder / "nonfinite_3.json").touch()


@pytest.mark.parametrize(
    ("left", "state"),
    [
        ({"adapter": 4}, "done"),
        ({"adapter": 4, "nonfinite": True}, "done"),  # it was tried again, and ended
        ({"adapter": 2}, "begun"),  # of fewer steps
        ({"nonfinite": True, "checkpoints": ["2"]}, "diverged"),
        ({"checkpoints": ["2"]}, "begun"),
        ({}, "begun"),
        ({"adapter": 4, "shards": "shared/shards", "table": "shared/table"}, "done"),  # filled in by the sweep
    ],
)
def test_states(tmp_path, left, state):
    leave(tmp_path, **left)
    assert state_of(tmp_path, config()) == state


def test_nothing_is_there(tmp_path):
    assert state_of(tmp_path / "absent", config()) == "new"
    (tmp_path / "log.txt").touch()
    assert state_of(tmp_path, config()) == "new"


def test_another_configuration(tmp_path):
    leave(tmp_path, adapter=4, shards="other")
    with pytest.raises(
        PSAError, match=r"another configuration, data.shards 'other' and not 'mine', seed 0 and not 3; "
    ):
        state_of(tmp_path, config(("seed", "3"), ("data.shards", "mine")))
    with pytest.raises(PSAError, match=r", batch_size 4 and not 8, .* and 1 more; give another --workdir"):
        changes = (("batch_size", "8"), ("seed", "3"), ("steps", "9"), ("log_every", "7"))
        state_of(tmp_path, config(*changes))


def test_the_latest_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) == 0
    leave(tmp_path, checkpoints=["9", "10", "11.orbax-checkpoint-tmp"])
    assert latest_checkpoint(tmp_path) == 10
