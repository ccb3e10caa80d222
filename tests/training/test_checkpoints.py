"""Checkpoints of a small state: what stays, what is damaged, what belongs to another run."""

import gc
import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from psa_jax.errors import PSAError
from psa_jax.training.checkpoints import Checkpoints, differences
from psa_jax.training.state import TrainState

IDENTITY = {"base_model": "abc", "objective": {"beta": 60.0, "shape": (1, 2)}, "seed": 0}


class Position(grain.DatasetIterator):
    """Stands for the data iterator."""

    def __init__(self, examples: int = 0):
        super().__init__()
        self.examples = examples

    def __next__(self):
        raise StopIteration

    def get_state(self):
        return {"examples": self.examples}

    def set_state(self, state):
        self.examples = state["examples"]


def state_at(step: int) -> TrainState:
    values = np.random.default_rng(step).normal(size=(64, 48)).astype(np.float32)
    return TrainState(jnp.int32(step), {"w": jnp.asarray(values)}, {"mu": jnp.asarray(values[:3])}, {})


def open_checkpoints(folder: Path, keep: int = 3, identity=IDENTITY, **options) -> Checkpoints:
    return Checkpoints(folder, keep=keep, identity=identity, **options)


def save(folder: Path, steps, held_out=None, **options) -> Path:
    with open_checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), Position(8 * step), (held_out or {}).get(step))
    return folder


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_restores(folder: Path, step: int) -> None:
    position = Position()
    with open_checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state_at(0), position)
    jax.tree.map(np.testing.assert_array_equal, found, state_at(step))
    assert position.examples == 8 * step


def test_nothing_saved(tmp_path: Path):
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state_at(0), Position()) is None


def test_the_last_and_the_best_stay(tmp_path: Path):
    accuracies = {1: 0.5, 2: 0.7, 3: 0.7, 4: 0.6, 6: 0.1}
    save(tmp_path, range(1, 5), accuracies, keep=2, keep_best=1)
    assert steps_in(tmp_path) == ["3", "4"]
    save(tmp_path, range(5, 8), accuracies, keep=2, keep_best=1)  # remembered by another process
    assert steps_in(tmp_path) == ["3", "6", "7"]
    assert_restores(tmp_path, 7)


def test_what_a_kill_left_of_an_older_one_goes_at_the_next_start(tmp_path: Path):
    """Killed after a save and before the deletion that follows it: nothing is saved after a restart at the end."""
    save(tmp_path / "run", range(1, 5), {1: 0.9}, keep=2, keep_best=1)
    save(tmp_path / "other", range(1, 4), keep=9)
    for step in ("2", "3"):
        shutil.copytree(tmp_path / "other" / step, tmp_path / "run" / step, dirs_exist_ok=True)
    with open_checkpoints(tmp_path / "run", keep=2, keep_best=1) as checkpoints:
        assert int(checkpoints.restore(state_at(0), Position()).step) == 4
    assert steps_in(tmp_path / "run") == ["1", "3", "4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), [10, 20])


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "20").rglob("*") if path.is_file())


# What of Orbax still waits for other arrays when one cannot be read complains that nobody listens any more.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(saved: Path, tmp_path: Path, damage: str, capsys):
    """Each file in turn. Orbax does without some of them; what it reads then is right."""
    fell_back = set()
    for number, path in enumerate(files_of(saved)):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        path = folder / path.relative_to(saved)
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif len(content) < 500:
            continue  # JSON and indices; the numbers are in the larger ones
        else:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        position = Position()
        with open_checkpoints(folder) as checkpoints:
            found = checkpoints.restore(state_at(0), position)
        step = position.examples // 8
        jax.tree.map(np.testing.assert_array_equal, found, state_at(step))
        said = capsys.readouterr().err
        if step == 10:
            fell_back.add(path.name)
            assert "checkpoint 20 cannot be read" in said and said.count("\n") == 1 and "going on from 10" in said
            assert steps_in(folder) == ["10", "damaged_20"]
            save(folder, [20])
            assert_restores(folder, 20)
        else:
            assert not said
    assert fell_back, damage
    gc.collect()  # complaints that belong to this test


def test_a_folder_without_its_arrays(saved: Path, tmp_path: Path, capsys):
    shutil.copytree(saved, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "20" / "state")
    assert_restores(tmp_path / "a", 10)


def test_no_readable_checkpoint_is_an_error(saved: Path, tmp_path: Path):
    folder = tmp_path / "a"
    shutil.copytree(saved, folder)
    for step in ("10", "20"):
        (folder / step / "about" / "metadata").write_text("{")
    with pytest.raises(PSAError, match=r"no checkpoint can be read \(20: .*; 10: .*\); bring a whole one back"):
        assert_restores(folder, 0)
    assert steps_in(folder) == ["10", "20"]


def test_another_run_is_refused_with_all_differences(saved: Path):
    other = {"base_model": "xyz", "objective": {"beta": 7.0, "shape": (1, 2)}, "seed": 0, "new": None, "more": 1}
    with (
        pytest.raises(PSAError) as caught,
        open_checkpoints(saved, identity=other) as checkpoints,
    ):
        checkpoints.restore(state_at(0), Position())
    text = str(caught.value)
    assert "checkpoint 20 was made with base_model = 'abc', this run has 'xyz'; " in text
    assert "more = None, this run has 1; objective.beta = 60.0, this run has 7.0; use another" in text
    assert "seed" not in text and "shape" not in text


def test_a_checkpoint_from_before_a_key_was_renamed(tmp_path: Path):
    old = IDENTITY | {"objective": IDENTITY["objective"] | {"anchor_weight": 0.0}}
    save(tmp_path, [10], identity=old)
    new = IDENTITY | {"objective": IDENTITY["objective"] | {"reference_kl_weight": 0.0}}
    with open_checkpoints(tmp_path, identity=new) as checkpoints:
        assert int(checkpoints.restore(state_at(0), Position()).step) == 10


def test_differences_of_lists():
    assert list(differences({"a": [1, 2]}, {"a": [1, 3]})) == ["a = [1, 2], this run has [1, 3]"]
    assert list(differences({"a": {"b": 1}}, {"a": {"b": 1}})) == []


def test_restores_on_other_devices(saved: Path):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    target = TrainState(
        jax.device_put(jnp.int32(0), whole),
        jax.device_put(state_at(0).params, split),
        jax.device_put(state_at(0).opt_state, whole),
        {},
    )
    with open_checkpoints(saved) as checkpoints:
        found = checkpoints.restore(target, Position())
    assert found.params["w"].sharding == split
    jax.tree.map(np.testing.assert_array_equal, found, state_at(20))


# What glob, TensorStore and URLs give a meaning to, and some that mean nothing to them.
NAMES = ["a[1]", "[1]", "a*b", "a?b", "a{b}", "a@2", "50%", "a%20b", "#2", "a b, c", "a:b", "é", "a;|b", "a&b=c"]
NAMES += ["~x", "a'b", "a+b$c"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_any_name(tmp_path: Path, name: str):
    (tmp_path / "aXb" / "20.orbax-checkpoint-tmp" / "ocdbt.process_0").mkdir(parents=True)  # what a pattern would find
    with open_checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(20, state_at(20), Position(160))
        checkpoints.verify()
    assert_restores(tmp_path / name, 20)
    (tmp_path / name).rename(tmp_path / "plain")
    assert_restores(tmp_path / "plain", 20)


def test_a_folder_that_tensorstore_would_write_elsewhere(tmp_path: Path):
    with pytest.raises(PSAError, match="takes a backslash for /"):
        open_checkpoints(tmp_path / "a\\b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("renamed", [False, True])
def test_what_an_earlier_version_left_in_such_a_folder(tmp_path: Path, monkeypatch, renamed: bool):
    """Its arrays are in the folder of the process that wrote them, and Orbax looks beside it."""
    folder = tmp_path / "a[1]"
    with monkeypatch.context() as patch:
        patch.setattr("psa_jax.training.checkpoints.as_it_is", epath.Path)
        save(folder, [10, 20])
    assert not (folder / "20" / "state" / "manifest.ocdbt").exists()
    if renamed:
        folder = folder.rename(tmp_path / "plain")
    assert_restores(folder, 20)
    assert steps_in(folder) == ["10", "20"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of Orbax's loop, left by the failure
def test_a_save_that_cannot_be_read_is_no_save(tmp_path: Path, monkeypatch):
    """The arrays go somewhere else, as they did where Orbax took a path for a pattern."""
    monkeypatch.setattr("psa_jax.training.checkpoints.as_it_is", epath.Path)
    with open_checkpoints(tmp_path / "a[1]") as checkpoints:
        checkpoints.verify()  # nothing saved: nothing to say
        checkpoints.save(20, state_at(20), Position(160))
        with pytest.raises(PSAError, match="checkpoint 20 was written and cannot be read back .*NOT_FOUND"):
            checkpoints.verify()


def test_a_save_of_other_numbers_is_no_save(tmp_path: Path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(20, state_at(20), Position(160))
        monkeypatch.setattr(checkpoints, "_about", lambda step: {"checksum": 1})
        with pytest.raises(PSAError, match="cannot be read back .*its checksum is another"):
            checkpoints.verify()
