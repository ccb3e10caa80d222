import itertools
import json
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.small_sage import TWO_USERS, CountingEncoder, write_sage

from psa_jax.data import build, pipeline
from psa_jax.data.preprocess import Preprocess
from psa_jax.data.shards import Shards, open_shards
from psa_jax.errors import PSAError
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.training.sharding import by_rows, make_mesh


@pytest.fixture(scope="module")
def shards(shard_dir: Path) -> Shards:
    return open_shards(shard_dir, "train")


def test_batches_hold_the_rows(shards: Shards, table: EmbeddingTable, bans):
    batch = next(iter(pipeline.make_pipeline(shards, table, batch_size=6, seed=0, balance="rows")))
    shapes = {name: (value.shape, value.dtype.name) for name, value in batch.items()}
    assert shapes == {
        "chosen": ((6, 4, 4, 6), "float16"),
        "rejected": ((6, 4, 4, 6), "float16"),
        "input_ids": ((6, 8), "int32"),
        "original_size": ((6, 2), "int32"),
        "crop": ((6, 2), "int32"),
        "user": ((6, table.dim), "float32"),
        "banned": ((6,), "bool"),
        "swapped": ((6,), "bool"),
        "unsafe": ((6,), "bool"),
        "safe_input_ids": ((6, 8), "int32"),
        "twin": ((6,), "bool"),
        "row": ((6,), "int32"),
    }
    for index, row in enumerate(batch["row"]):
        expected = shards[int(row)]
        user_id = expected["user_id"].decode()
        category = expected["file_name"].decode().split("_")[2]
        np.testing.assert_array_equal(batch["chosen"][index], expected["moments_chosen"])
        np.testing.assert_array_equal(batch["rejected"][index], expected["moments_rejected"])
        np.testing.assert_array_equal(batch["input_ids"][index], expected["input_ids"])
        np.testing.assert_array_equal(batch["safe_input_ids"][index], expected["safe_input_ids"])
        assert batch["twin"][index]
        assert (batch["original_size"][index].tolist(), batch["crop"][index].tolist()) == ([8, 12], [0, 2])
        np.testing.assert_array_equal(batch["user"][index], table.embeddings[table.ids.index(user_id)])
        assert batch["banned"][index] == (category in bans[user_id]) and not batch["swapped"][index]
        assert batch["unsafe"][index] == expected["file_name"].decode().endswith("_u.jpg")


def test_drawn_users_follow_the_label_rule(shards: Shards, table: EmbeddingTable, bans):
    """Every unsafe prompt meets users who ban it half the time, and the preferred picture is the one they want."""
    options = {"batch_size": 8, "seed": 3, "balance": "users", "safe_share": 0.25, "num_epochs": 12}
    met, drawn_unsafe, users = {}, [], {}
    for batch in pipeline.make_pipeline(shards, table, **options):
        for index, row in enumerate(batch["row"].tolist()):
            stored, banned = shards[row], bool(batch["banned"][index])
            unsafe, category = int(stored["kind"]) == 1, int(stored["category"])
            drawn_unsafe.append(unsafe)
            assert banned == (batch["user"][index][-7:][category] == 1)  # the embedding is that user's
            # The safe picture is the chosen one of a safe prompt, and of an unsafe one that its own user bans.
            safe_first = not unsafe or bool(stored["banned"])
            safe, other = ("chosen", "rejected") if safe_first else ("rejected", "chosen")
            wanted = safe if banned or not unsafe else other
            np.testing.assert_array_equal(batch["chosen"][index], stored[f"moments_{wanted}"])
            left = other if wanted == safe else safe
            np.testing.assert_array_equal(batch["rejected"][index], stored[f"moments_{left}"])
            assert batch["swapped"][index] == (wanted == "rejected")
            if unsafe:
                met.setdefault(category, []).append(banned)
                users.setdefault(row, set()).add(batch["user"][index].tobytes())
            else:
                own = table.embeddings[table.ids.index(stored["user_id"].decode())]
                np.testing.assert_array_equal(batch["user"][index], own)
        assert batch["twin"].all()
    assert abs(np.mean(drawn_unsafe) - 0.75) < 0.02
    for category, drawn in met.items():
        assert abs(np.mean(drawn) - 0.5) < 4 * 0.5 / np.sqrt(len(drawn)), category
    assert np.mean([len(seen) for seen in users.values()]) > 2  # four users in all


def test_how_many_users_ban_is_a_setting(shards: Shards, table: EmbeddingTable):
    options = {"batch_size": 8, "seed": 3, "balance": "users", "safe_share": 0.25, "num_epochs": 12}
    for share in (0.0, 0.9, 1.0):
        batches = list(pipeline.make_pipeline(shards, table, banned_share=share, **options))
        unsafe, banned = (np.concatenate([batch[name] for batch in batches]) for name in ("unsafe", "banned"))
        assert abs(np.mean(banned[unsafe]) - share) <= 0.04


def test_drawn_users_do_not_depend_on_the_number_of_processes(shards: Shards, table: EmbeddingTable):
    options = {"batch_size": 8, "seed": 3}
    whole = next(iter(pipeline.make_pipeline(shards, table, **options)))
    for process in range(2):
        part = next(iter(pipeline.make_pipeline(shards, table, process_index=process, process_count=2, **options)))
        np.testing.assert_array_equal(part["user"], whole["user"][4 * process : 4 * process + 4])
        np.testing.assert_array_equal(part["chosen"], whole["chosen"][4 * process : 4 * process + 4])


def rows_of(dataset: grain.IterDataset) -> list[list[int]]:
    return [batch["row"].tolist() for batch in dataset]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_slices_are_the_data_once_an_epoch(shards: Shards, table: EmbeddingTable, processes: int):
    """112 rows in global batches of 8: the same global batches whatever the number of processes."""
    options = {"batch_size": 8, "seed": 5, "balance": "none", "num_epochs": 2, "process_count": processes}
    slices = [rows_of(pipeline.make_pipeline(shards, table, process_index=p, **options)) for p in range(processes)]
    steps = [[row for rows in step for row in rows] for step in zip(*slices, strict=True)]
    assert len(steps) == 28
    epochs = [[row for step in part for row in step] for part in (steps[:14], steps[14:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(112))] * 2
    assert epochs[0] != epochs[1]  # another order
    whole = rows_of(pipeline.make_pipeline(shards, table, **(options | {"process_count": 1})))
    assert steps == whole  # in order: a pair's noise depends on its place


def test_without_shuffling_rows_come_in_order(shards: Shards, table: EmbeddingTable):
    options = {"batch_size": 50, "seed": 0, "balance": "none", "shuffle": False, "num_epochs": 1}
    assert [len(rows) for rows in rows_of(pipeline.make_pipeline(shards, table, **options))] == [50, 50]
    batches = rows_of(pipeline.make_pipeline(shards, table, drop_remainder=False, **options))
    assert batches == [list(range(50)), list(range(50, 100)), list(range(100, 112))]


def test_seed_decides_the_order(shards: Shards, table: EmbeddingTable):
    def first(seed: int) -> list[int]:
        return next(iter(pipeline.make_pipeline(shards, table, batch_size=32, seed=seed)))["row"].tolist()

    assert first(1) == first(1) != first(2)


def assert_equal_batches(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


@pytest.mark.parametrize("threads", [0, 4])
def test_state_gives_the_same_batches(shards: Shards, table: EmbeddingTable, threads: int):
    dataset = pipeline.make_pipeline(shards, table, batch_size=16, seed=9, read_threads=threads)
    iterator = iter(dataset)
    for _ in range(20):  # beyond the first epoch
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(5)]
    fresh = iter(pipeline.make_pipeline(shards, table, batch_size=16, seed=9, read_threads=threads))
    fresh.set_state(json.loads(state))
    for batch in expected:
        assert_equal_batches(batch, next(fresh))
    iterator.set_state(json.loads(state))  # back in time on a used iterator
    assert_equal_batches(expected[0], next(iterator))


def test_state_in_an_orbax_checkpoint(shards: Shards, table: EmbeddingTable, tmp_path: Path):
    iterator = iter(pipeline.make_pipeline(shards, table, batch_size=16, seed=9))
    weights = {"w": np.arange(3, dtype=np.float32)}
    with ocp.CheckpointManager(tmp_path / "ckpt", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        for step in range(1, 5):
            next(iterator)
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(weights), data=grain.checkpoint.CheckpointSave(iterator)
                ),
            )
    expected = [next(iterator) for _ in range(3)]
    fresh = iter(pipeline.make_pipeline(shards, table, batch_size=16, seed=9))
    with ocp.CheckpointManager(tmp_path / "ckpt") as manager:
        restored = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(weights), data=grain.checkpoint.CheckpointRestore(fresh)
            ),
        )
    np.testing.assert_array_equal(restored["state"]["w"], weights["w"])
    for batch in expected:
        assert_equal_batches(batch, next(fresh))


@pytest.mark.parametrize(("before", "after"), [((4, 8), (2, 8)), ((1, 8), (4, 4)), ((2, 16), (1, 4))])
def test_an_epoch_goes_on_with_other_processes(shards: Shards, table: EmbeddingTable, before, after):
    """(processes, batch size) change after 5 batches; a row comes once an epoch, in the order of an unbroken run."""
    options = {"seed": 5, "balance": "none", "num_epochs": 2}

    def run(processes: int, batch_size: int, state: dict | None, steps: int | None) -> tuple[list[int], dict]:
        iterators = []
        for index in range(processes):
            dataset = pipeline.make_pipeline(
                shards, table, batch_size=batch_size, process_index=index, process_count=processes, **options
            )
            iterators.append(iter(dataset))
            if state is not None:
                iterators[-1].set_state(state)
        rows = []
        for step in itertools.count():
            parts = [next(iterator, None) for iterator in iterators] if step != steps else [None] * processes
            if any(part is None for part in parts):
                assert all(part is None for part in parts)  # no process waits for another
                break
            rows += np.concatenate([part["row"] for part in parts]).tolist()
        (one,) = {json.dumps(iterator.get_state()) for iterator in iterators}  # any process's will do
        return rows, json.loads(one)

    first, state = run(*before, None, 5)
    rest, state = run(*after, state, None)
    assert sorted((first + rest)[:112]) == sorted((first + rest)[112:]) == list(range(112))
    assert first + rest == run(1, 8, None, None)[0]
    assert state == {"examples": 224}


def test_no_process_draws_more_batches_than_another(shards: Shards, table: EmbeddingTable):
    """112 rows from position 5 on: 107, of which 104 fill batches of 8; process 0 alone would have 54 rows."""
    lengths = []
    for index in range(2):
        options = {"batch_size": 8, "seed": 0, "balance": "none", "num_epochs": 1}
        iterator = iter(pipeline.make_pipeline(shards, table, process_index=index, process_count=2, **options))
        iterator.set_state({"examples": 5})
        lengths.append(len(list(iterator)))
    assert lengths == [13, 13]


@pytest.mark.parametrize("state", [{}, {"next_index": 3}, {"examples": -1}, {"examples": 225}, {"examples": 1.5}, 3])
def test_bad_positions_are_refused(shards: Shards, table: EmbeddingTable, state):
    iterator = iter(pipeline.make_pipeline(shards, table, batch_size=8, seed=0, balance="none", num_epochs=2))
    with pytest.raises(PSAError, match="position in the data"):
        iterator.set_state(state)


def test_batches_on_devices(shards: Shards, table: EmbeddingTable):
    """Arrays over eight devices, and a position that counts what was drawn and not what was made ahead."""
    sharding = by_rows(make_mesh(8))
    options = {"batch_size": 16, "seed": 9}
    plain = iter(pipeline.make_pipeline(shards, table, **options))
    place = pipeline.to_devices(sharding, ("chosen", "user", "row"))
    iterator = iter(pipeline.make_pipeline(shards, table, place=place, **options))
    for _ in range(3):
        batch, expected = next(iterator), next(plain)
        assert batch.keys() == {"chosen", "user", "row"}
        for name, array in batch.items():
            assert array.sharding == sharding and array.addressable_shards[0].data.shape[0] == 2
            np.testing.assert_array_equal(array, expected[name])
    assert iterator.get_state() == plain.get_state() == {"examples": 48}
    iterator.close()


@pytest.fixture(scope="module")
def flipped(tmp_path_factory, build_options) -> Shards:
    root = tmp_path_factory.mktemp("flipped")
    write_sage(root / "sage", TWO_USERS)
    build.build_shards(root / "sage", root / "out", encode=CountingEncoder(), flips=True, **build_options)
    return open_shards(root / "out", "train")


def test_pairs_flip_together(flipped: Shards, table: EmbeddingTable):
    """Both pictures or neither; about half; drawn anew each epoch; the same for every number of processes."""
    options = {"batch_size": 8, "seed": 3, "balance": "none", "num_epochs": 12, "flips": True}
    mirrored = {}
    for batch in pipeline.make_pipeline(flipped, table, **options):
        for row, chosen, rejected in zip(batch["row"].tolist(), batch["chosen"], batch["rejected"], strict=True):
            stored = flipped[row]
            is_mirrored = not np.array_equal(chosen, stored["moments_chosen"])
            suffix = "_flipped" if is_mirrored else ""
            np.testing.assert_array_equal(chosen, stored[f"moments_chosen{suffix}"])
            np.testing.assert_array_equal(rejected, stored[f"moments_rejected{suffix}"])
            mirrored.setdefault(row, []).append(is_mirrored)
    share = np.mean(list(mirrored.values()))
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(12 * 56)
    assert np.mean([0 < sum(draws) < 12 for draws in mirrored.values()]) > 0.9

    whole = next(iter(pipeline.make_pipeline(flipped, table, **options)))
    part = next(iter(pipeline.make_pipeline(flipped, table, process_index=1, process_count=2, **options)))
    np.testing.assert_array_equal(part["chosen"], whole["chosen"][4:])


def test_flips_need_mirrored_pictures(shards: Shards, table: EmbeddingTable):
    with pytest.raises(PSAError, match="--flips"):
        pipeline.make_pipeline(shards, table, batch_size=8, seed=0, flips=True)


def test_unknown_user_is_an_error_before_the_first_step(shards: Shards, table: EmbeddingTable):
    small = EmbeddingTable(table.ids[:5], table.embeddings[:5], table.encoder, table.fingerprint)
    with pytest.raises(PSAError, match="0000007.* not in the embedding table"):
        pipeline.make_pipeline(shards, small, batch_size=4, seed=0)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 9, "process_count": 2},
        {"process_count": 2, "process_index": 2},
        {"batch_size": 0},
        {"balance": "yes"},
        {"seed": -1},
        {"batch_size": 1000, "num_epochs": 1},
    ],
)
def test_bad_options_are_refused(shards: Shards, table: EmbeddingTable, options: dict):
    with pytest.raises(PSAError):
        pipeline.make_pipeline(shards, table, **({"batch_size": 8, "seed": 0} | options))


def test_preprocess_matches_the_shards(shards: Shards):
    assert Preprocess(**shards.info["preprocess"]) == Preprocess(8)
