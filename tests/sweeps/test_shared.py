"""What points share: the same folder for the same data, the reference's errors computed once."""

import json
from pathlib import Path

import pytest

from psa_jax.mini.dataset import render_mini
from psa_jax.mini.prepare import prepare as prepare_data
from psa_jax.sweeps import shared
from psa_jax.sweeps.shared import missing, prepare, shared_overrides
from psa_jax.tools.configs import read_config
from psa_jax.training import reference
from psa_jax.training.run import prepare_run


def config(**values):
    return read_config("tiny:dpo-smoke", [(key.replace("__", "."), str(value)) for key, value in values.items()])


def test_points_of_the_same_data_share_a_folder(tmp_path):
    first = shared_overrides(config(), tmp_path)
    assert first == shared_overrides(config(seed=1, objective__beta=3.0), tmp_path)
    assert [key for key, _ in first] == ["data.shards", "data.table"]
    others = [{"data__mini__users": 50}, {"data__mini__seed": 9}, {"vae": "/somewhere"}, {"model": "/elsewhere"}]
    folders = {Path(shared_overrides(config(**other), tmp_path)[0][1]).parent for other in [{}, *others]}
    assert len(folders) == 5 and {folder.parent for folder in folders} == {tmp_path / "shared"}
    own = config(data__shards="shards", data__table="table")
    assert shared_overrides(own, tmp_path) == [] and missing([own], tmp_path, reference=True) == []
    drawn = config(reference__draws=2)
    assert shared_overrides(drawn, tmp_path)[2:] == [("reference.folder", str(tmp_path / "shared" / "reference"))]
    assert shared_overrides(config(reference__draws=2, reference__folder="mine"), tmp_path) == first


def test_one_of_the_points_makes_what_all_need(tmp_path):
    """Two data sets; and reference errors of the draws, the batches and the text dropout that there are."""
    points = [config(seed=seed, data__mini__seed=data) for data in (1, 2) for seed in (0, 1)]
    assert missing(points, tmp_path, reference=True) == [points[0], points[2]]
    folder = Path(shared_overrides(points[0], tmp_path)[0][1]).parent
    (folder / "shards").mkdir(parents=True)
    assert len(missing(points, tmp_path, reference=False)) == 2  # the table is missing
    (folder / "table.safetensors").touch()
    assert missing(points, tmp_path, reference=False) == [points[2]]

    drawn = {"reference__draws": 2, "data__shards": "shards", "data__table": "table"}
    changes = [{}, {"objective__beta": 9.0}, {"optimizer__learning_rate": 1.0}, {"objective__text_dropout": 0.5}]
    changes += [{"reference__seed": 1}, {"batch_size": 8}, {"batch_size": 8, "accumulate": 2}]
    points = [config(**drawn, **change) for change in changes]
    wanted = missing(points, tmp_path, reference=True)
    assert [points.index(each) for each in wanted] == [0, 3, 4, 5]  # 8 in two parts are batches of 4, as the first
    assert missing(points, tmp_path, reference=False) == []


def test_data_are_made_with_held_out_rows(tmp_path, monkeypatch):
    """A point that is added later may measure on them."""
    made = []
    monkeypatch.setattr(shared, "with_mini", lambda config, folder: made.append((config.validate.every, folder)))
    point = config()
    prepare(point, pytest.fail, tmp_path, reference=True)
    assert made == [(1, Path(shared_overrides(point, tmp_path)[0][1]).parent)] and point.validate.every == 0


def test_a_run_finds_the_errors_that_were_computed_for_all(smallest_pipeline, tmp_path, monkeypatch):
    model, data = smallest_pipeline[1], tmp_path / "data"
    render_mini(data / "sage", 8, 3)
    lines = (data / "sage" / "train" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (data / "sage" / "train" / "metadata.jsonl").write_text("".join(lines[:16]))
    prepare_data(data, model, users=8, seed=3, resolution=32, splits=("train",))
    values = {"model": model.folder, "data__shards": data / "shards", "data__table": data / "table.safetensors"}
    values |= {"reference__draws": 1, "data__balance": "none"}
    point = config(**values)
    ((key, folder),) = shared_overrides(point, tmp_path / "w")

    def whole(**changed):
        return config(**values, **{key.replace(".", "__"): folder}, **changed)

    (tmp_path / "w" / "shared").mkdir(parents=True)
    prepare(point, whole, tmp_path / "w", reference=True)
    assert missing([point], tmp_path / "w", reference=True) == []
    kept = {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("*.safetensors")}
    assert kept

    monkeypatch.setattr(reference, "_errors_of_rows", lambda *given: iter(()))  # nothing can be computed any more
    run = prepare_run(whole(seed=1, objective__beta=7.0), tmp_path / "w" / "point")
    table = reference.reference_table(
        run.setup, run.frozen, run.shared, run.shards, run.table, Path(folder), batch_size=4, between=pytest.fail
    )
    assert table.shape == (16, 1, 2)
    assert {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("*.safetensors")} == kept
    assert json.loads(whole().to_json_best_effort())["reference"]["folder"] == folder
