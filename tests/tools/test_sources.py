"""Commands whose sources are in a bucket do what they do with files; nothing of it is written there."""

import json
from argparse import Namespace
from pathlib import Path

from support.object_server import ObjectServer

from psa_jax.cli import main
from psa_jax.paths import Address, Source
from psa_jax.tools.configs import read_config
from psa_jax.tools.sources import KEYS, bring_sources

TINY = str(Path(__file__).resolve().parents[2] / "configs" / "tiny.py")


def put(server: ObjectServer, folder: Path, key: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            server.objects[f"{key}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


def test_flags_lists_and_keys(server):
    server.objects |= {f"{name}/x": name.encode() for name in ("model", "table", "a", "shards")}
    config = read_config(TINY, [("model", "gs://bucket/model"), ("data.shards", "s3://bucket/shards")])
    workdir = Address("s3", "bucket", "run")
    args = Namespace(
        takes_config=True,
        config=config,
        model="gs://bucket/model",
        vae=None,
        table=Source("s3", "bucket", "table"),
        pictures=[Source("s3", "bucket", "a"), Path("b")],
        workdir=workdir,
        prompt="gs://bucket/model",  # a text that is no path
    )
    bring_sources(args)
    assert (args.table / "x").read_bytes() == b"table" and args.pictures[1] == Path("b")
    assert (args.pictures[0] / "x").read_bytes() == b"a"
    assert args.model == config.model and (Path(args.model) / "x").read_bytes() == b"model"
    assert (Path(config.data.shards) / "x").read_bytes() == b"shards" and config.is_locked
    assert (args.workdir, args.vae, args.prompt, config.data.table) == (workdir, None, "gs://bucket/model", "")


def test_keys_that_are_only_read():
    """Of all keys that are paths, those that a training writes stay on this machine."""
    from psa_jax.training.settings import PATHS

    assert set(PATHS) - set(KEYS) == {"reference.folder", "pretrain.start"}
    assert set(KEYS) <= set(PATHS)


def test_an_export_of_a_run_in_a_bucket(server, run_folder, tmp_path, capsys):
    put(server, run_folder[1], "runs/own")
    server.objects["runs/own/checkpoints/7/state/d/1"] = b"large"
    for source, out in (("s3://bucket/runs/own", "a"), (str(run_folder[1]), "b")):
        assert main(["export", source, f"--out={tmp_path / out}"]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert {method for method, _ in server.requests} == {"GET", "HEAD"}
    assert not any("checkpoints/7" in path for _, path in server.requests)
    assert json.loads(capsys.readouterr().out.splitlines()[0])["format"] == "native"


def test_pictures_with_model_adapter_and_table_in_a_bucket(server, run_folder, tmp_path):
    model, run = run_folder
    put(server, model, "model")
    put(server, run, "run")
    words = ["generate", "--prompt=a cat", "--user=0000002", "--steps=1"]
    for place, out in (("gs://bucket/{}", "a"), ("{}", "b")):
        given = {"model": model, "run": run} if out == "b" else {"model": "model", "run": "run"}
        base = [f"--model={place.format(given['model'])}", f"--adapter={place.format(given['run'])}"]
        table = f"--table={place.format(given['run'])}/table.safetensors"
        assert main([*words, *base, table, f"--out={tmp_path / out}"]) == 0
    (picture,) = (tmp_path / "a").glob("*.png")
    assert picture.read_bytes() == (tmp_path / "b" / picture.name).read_bytes()


def test_a_source_that_is_refused_is_one_line(server, refused):
    server.refuses = {"GET", "HEAD"}
    line = refused("export", "s3://bucket/run", "--out=out")
    assert "s3://bucket/run: cannot be read: access is refused (403 Forbidden); docs/training.md says where" in line
