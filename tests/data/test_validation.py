"""Held-out batches: rows, noise and timesteps that do not move."""

from pathlib import Path

import numpy as np
import pytest

from psa_jax.data.shards import Shards, open_shards
from psa_jax.data.validation import row_noise, spread_timesteps, validation_batches
from psa_jax.errors import PSAError
from psa_jax.profiles.table import EmbeddingTable


@pytest.fixture(scope="module")
def shards(shard_dir: Path) -> Shards:
    return open_shards(shard_dir, "train")


def by_row(batches, count: int) -> dict[int, dict[str, np.ndarray]]:
    """The first `count` rows, which all differ; those after them are copies of the last one."""
    every = [
        {name: value[index] for name, value in batch.items()} for batch in batches for index in range(len(batch["row"]))
    ]
    found = {int(values["row"]): values for values in every[:count]}
    assert len(found) == count
    assert {int(values["row"]) for values in every[count:]} <= {int(every[count - 1]["row"])}
    return found


def test_every_row_once_with_its_own_noise(shards: Shards, table: EmbeddingTable):
    batches = list(validation_batches(shards, table, batch_size=16, seed=1, rows=40))
    assert [len(batch["row"]) for batch in batches] == [16, 16, 16]
    found = by_row(batches, 40)
    for row, values in found.items():
        np.testing.assert_array_equal(values["chosen"], shards[row]["moments_chosen"])
        np.testing.assert_array_equal(values["noise"], row_noise(row, (4, 4, 3), 1))
    noise = np.stack([values["noise"] for values in found.values()])
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size) and abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)


def test_neither_batch_size_nor_processes_matter(shards: Shards, table: EmbeddingTable):
    expected = by_row(validation_batches(shards, table, batch_size=16, seed=1, rows=41), 41)
    parts = [
        list(validation_batches(shards, table, batch_size=12, seed=1, rows=41, process_index=i, process_count=3))
        for i in range(3)
    ]
    assert {len(part) for part in parts} == {4} and {len(batch["row"]) for part in parts for batch in part} == {4}
    whole = [{name: np.concatenate([part[n][name] for part in parts]) for name in parts[0][n]} for n in range(4)]
    found = by_row(whole, 41)
    assert found.keys() == expected.keys()
    for row, values in expected.items():
        for name, value in values.items():
            np.testing.assert_array_equal(found[row][name], value)
    other = by_row(validation_batches(shards, table, batch_size=16, seed=2, rows=41), 41)
    assert other.keys() != expected.keys()


def test_timesteps_cover_the_schedule_evenly():
    """Ten rows and 1,000 timesteps: one in each hundred."""
    times = spread_timesteps(10, 1000, seed=4)
    assert sorted(times // 100) == list(range(10)) and times.tolist() != sorted(times)
    np.testing.assert_array_equal(times, spread_timesteps(10, 1000, seed=4))
    assert sorted(spread_timesteps(1000, 1000, seed=4)) == list(range(1000))


def test_rows_that_do_not_exist(shards: Shards, table: EmbeddingTable):
    with pytest.raises(PSAError, match="113 rows: the split has 112"):
        next(validation_batches(shards, table, batch_size=4, seed=0, rows=113))
