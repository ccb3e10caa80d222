"""The safe prompt of each pair comes with the row of its unsafe prompt, whatever the order of the rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from psa_jax.data import build, sage
from psa_jax.data.encoding import TextCache
from psa_jax.data.shards import INFO_FILE, open_shards, read_info
from psa_jax.data.twins import NO_TWIN, safe_rows
from psa_jax.errors import PSAError


def lines_of(folder: Path) -> tuple[Path, list[str]]:
    path = folder / "train" / "metadata.jsonl"
    return path, path.read_text().splitlines(keepends=True)


def shuffled(folder: Path) -> None:
    """Rows in another order: partners are no longer neighbours."""
    path, lines = lines_of(folder)
    order = np.random.default_rng(0).permutation(len(lines))
    path.write_text("".join(lines[index] for index in order))


def test_twins_are_found_by_name_and_not_by_order(sage_dir: Path, tmp_path: Path, encode, build_options):
    shuffled(sage_dir)
    records = sage.read_split(sage_dir, "train")
    assert [record.unsafe for record in records] != [True, False] * 28
    captions = {(r.stem, r.unsafe): r.caption for r in records}

    def states(ids: np.ndarray) -> dict[str, np.ndarray]:
        return {"states": np.repeat(ids[:, 0, :, None], 2, axis=2) / 2.0}

    text = TextCache(states, "cafe")
    out = build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options, text=text)
    shards = open_shards(out, "train")
    for index, record in enumerate(records):
        row, safe = shards[index], captions[record.stem, False]
        assert row["twin"] and shards.columns.twins[index]
        ids = [ord(character) for character in safe[:8]]
        assert row["safe_input_ids"].tolist() == ids
        np.testing.assert_array_equal(row["safe_text_states"], np.repeat(np.asarray(ids)[:, None], 2, axis=1) / 2)
        if not record.unsafe:
            np.testing.assert_array_equal(row["safe_input_ids"], row["input_ids"])
    assert read_info(out)["unpaired"] == {"train": 0}


def test_a_pair_without_its_safe_row_is_counted_and_said(sage_dir: Path, tmp_path: Path, encode, build_options, capsys):
    path, lines = lines_of(sage_dir)
    gone = next(index for index, line in enumerate(lines) if json.loads(line)["file_name"].endswith("_s.jpg"))
    stem = json.loads(lines[gone])["file_name"].split(".jpg")[0]
    path.write_text("".join(lines[:gone] + lines[gone + 1 :]))
    out = build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    assert "train: 1 of 55 rows: an unsafe prompt whose safe prompt is not there" in capsys.readouterr().err
    shards, records = open_shards(out, "train"), sage.read_split(sage_dir, "train")
    assert read_info(out)["unpaired"] == {"train": 1}
    lacking = [index for index in range(len(shards)) if not shards[index]["twin"]]
    assert [records[index].stem for index in lacking] == [stem]
    assert np.flatnonzero(~shards.columns.twins).tolist() == lacking
    row = shards[lacking[0]]
    np.testing.assert_array_equal(row["safe_input_ids"], row["input_ids"])
    assert (safe_rows(records) == NO_TWIN).sum() == 1


@pytest.mark.parametrize("version", ["psa_jax.shards/2", "psa_jax.shards/1"])
def test_shards_of_another_version_are_one_line(shard_dir: Path, tmp_path: Path, version: str):
    old = tmp_path / "old"
    shutil.copytree(shard_dir, old)
    info = json.loads((old / INFO_FILE).read_text()) | {"format": version}
    del info["unpaired"]
    (old / INFO_FILE).write_text(json.dumps(info))
    says = f"shards of {version}, this version reads psa_jax.shards/3.* build the shards again"
    with pytest.raises(PSAError, match=says) as caught:
        open_shards(old, "train")
    assert "\n" not in str(caught.value)
