"""`psa-jax doctor`: what is missing is named with what mends it, and what is there is not complained of."""

import dataclasses
import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.object_server import ObjectServer

from psa_jax import remote
from psa_jax.cli import main
from psa_jax.data.shards import open_shards
from psa_jax.errors import PSAError
from psa_jax.paths import Address
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.training import diagnosis
from psa_jax.training.diagnosis import Setting, diagnose


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function: package -> version sets what is installed; and no accelerator is seen."""
    monkeypatch.setattr(diagnosis, "DEVICES", tmp_path)
    monkeypatch.delenv(diagnosis.VARIABLE, raising=False)
    real, told = importlib.metadata.version, {}

    def version(name: str) -> str:
        if told.get(name, name) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return told.get(name) or real(name)

    monkeypatch.setattr(diagnosis, "version", version)
    return told.update


def named(findings, name: str):
    (found,) = (each for each in findings if each.name == name)
    return found


def test_this_machine_is_well(machine):
    findings = diagnose(Setting())
    assert [each.name for each in findings] == ["packages", "devices", "libtpu", "room", "cache"]
    assert all(each.well for each in findings if each.name != "libtpu")
    assert f"jax {importlib.metadata.version('jax')}" in named(findings, "packages").said
    assert "cpu" in named(findings, "devices").said and "GiB of disk free" in named(findings, "room").said


def test_packages_outside_their_range(machine):
    machine({"flax": "0.10.7"})
    found = named(diagnose(Setting()), "packages")
    assert not found.well and found.said == "flax is 0.10.7; pip install 'flax<0.13,>=0.12'"
    machine({"flax": None})
    assert named(diagnose(Setting()), "packages").said.startswith("flax is not installed; pip install 'flax")
    machine({"flax": "0.12.99", "jaxlib": "0.9.0"})  # psa_jax does not name it; jax does
    said = named(diagnose(Setting()), "packages").said
    assert said.startswith("jaxlib is 0.9.0; pip install 'jaxlib")
    Requirement(said.split("'")[1])


def test_libtpu_of_another_jax(machine):
    machine({"libtpu": "0.0.1"})
    found = named(diagnose(Setting()), "libtpu")
    assert not found.well and found.said.startswith("libtpu is 0.0.1; pip install 'libtpu==")
    machine({"libtpu": found.said.split("==")[1].replace("*'", "1").rstrip("'")})
    assert named(diagnose(Setting()), "libtpu").well
    machine({"libtpu": None})
    assert named(diagnose(Setting()), "libtpu").well  # nothing here needs it


@pytest.mark.parametrize(("device", "advice"), [("accel0", "psa_jax[tpu]"), ("nvidia0", "jax[cuda]")])
def test_an_accelerator_that_is_not_used(machine, tmp_path, device, advice):
    (tmp_path / device).touch()
    found = named(diagnose(Setting()), "devices")
    assert not found.well and "JAX uses the CPU" in found.said and advice in found.said


def test_room_and_cache(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis, "LEAST_ROOM", 1 << 62)
    assert "make room" in named(diagnose(Setting(workdir=tmp_path / "a" / "b")), "room").said
    monkeypatch.setenv(diagnosis.VARIABLE, str(tmp_path / "cache"))
    assert named(diagnose(Setting()), "cache").said == str(tmp_path / "cache")
    (tmp_path / "file").touch()
    monkeypatch.setenv(diagnosis.VARIABLE, str(tmp_path / "file"))
    assert "cannot be written; give a folder" in named(diagnose(Setting()), "cache").said
    monkeypatch.setenv(diagnosis.VARIABLE, "gs://bucket/cache")
    assert named(diagnose(Setting()), "cache").well


def test_a_workdir_in_a_bucket_is_tried(machine, monkeypatch, tmp_path):
    place = Address("s3", "bucket", "run")
    with ObjectServer().running() as server:
        for name, value in (server.environment() | {remote.CACHE: str(tmp_path / "copies")}).items():
            monkeypatch.setenv(name, value)
        assert diagnosis.workdir(Setting(workdir=place)) == "s3://bucket/run: can be written" and server.objects == {}
        assert str(tmp_path / "copies") in named(diagnose(Setting(workdir=place)), "room").said
        server.refuses = {"PUT"}
        with pytest.raises(PSAError, match="s3://bucket/run: cannot be written: access is refused"):
            diagnosis.workdir(Setting(workdir=place))


def test_a_configuration_that_is_ready(machine, training_config, tmp_path):
    findings = diagnose(Setting(training_config(), tmp_path / "run"))
    assert [each for each in findings if not each.well] == []
    assert {"configuration", "mesh", "base model", "workdir", "shards", "table"} <= {each.name for each in findings}
    assert list(tmp_path.iterdir()) == []  # it leaves nothing


def test_mistakes_do_not_hide_each_other(machine, training_config, tmp_path):
    """A batch that the devices cannot share, a table without the shards' users, and a folder that is a file."""
    config = training_config(accumulate=3)
    table = EmbeddingTable.load(config.data.table)
    with config.unlocked():
        config.data.table = str(tmp_path / "few.safetensors")
    part = dataclasses.replace(table, ids=table.ids[:1], embeddings=table.embeddings[:1])
    part.save(tmp_path / "few.safetensors")
    (tmp_path / "run").touch()
    findings = diagnose(Setting(config, tmp_path / "run"))
    bad = {each.name: each.said for each in findings if not each.well}
    assert "accumulate = 3" in bad["mesh"] and "run: not a folder" in bad["configuration"]
    splits = [open_shards(Path(config.data.shards), split).columns.user_ids for split in ("train", "val")]
    count = len({user for users in splits for user in users} - {table.ids[0]})
    assert f"lacks {count} users" in bad["table"] and "psa-jax encode --add" in bad["table"]
    assert not any(each in bad["table"] for each in table.ids)
    assert named(findings, "shards").well and named(findings, "base model").well


def test_shards_of_another_vae(machine, training_config, tmp_path):
    config = training_config()
    shards = tmp_path / "shards"
    shutil.copytree(config.data.shards, shards)
    info = json.loads((shards / "fingerprint.json").read_text())
    (shards / "fingerprint.json").write_text(json.dumps(info | {"fingerprint": "0" * len(info["fingerprint"])}))
    with config.unlocked():
        config.data.shards = str(shards)
    found = named(diagnose(Setting(config)), "shards")
    assert not found.well and "build the shards again with this model" in found.said


def test_command(machine, capsys, tmp_path):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("ok   packages") and json.loads(out[-1])["missing"] == []
    assert main(["doctor", "--config=sd15", f"--workdir={tmp_path / 'run'}"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["missing"] == ["configuration", "base model"]
    assert any(line.startswith("NOT  base model") and "give --model=PATH" in line for line in out)
    assert main(["doctor", "--config=tiny", "--config.batch_size=x"]) == 1
    assert "batch_size" in capsys.readouterr().err


def test_a_platform_that_does_not_start(machine, monkeypatch, training_config):
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr(diagnosis.jax, "devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    findings = diagnose(Setting(training_config()))
    for name in ("devices", "mesh"):
        said = named(findings, name).said
        assert "Unable to initialize backend 'tpu'" in said and "JAX_PLATFORMS is 'tpu': unset it" in said
    assert named(findings, "packages").well and named(findings, "table").well


def test_what_is_not_set(machine, training_config, tmp_path):
    config = training_config()
    with config.unlocked():
        config.data.table = ""
    (tmp_path / "file").touch()
    findings = diagnose(Setting(config, tmp_path / "file"))
    assert "data.table is not set; give --config.data.table=FILE" in named(findings, "table").said
    assert "file: not a folder" in named(findings, "workdir").said
    with config.unlocked():
        config.mesh.slices = 99
    assert "the devices of this host alone" in named(diagnose(Setting(config)), "mesh").said


def test_a_check_that_breaks_is_not_hidden(monkeypatch):
    """Only what a check says itself is a finding."""

    def broken(setting):
        raise ValueError("a bug")

    monkeypatch.setattr(diagnosis, "OF_MACHINE", {"broken": broken})
    with pytest.raises(ValueError, match="a bug"):
        diagnose(Setting())
    monkeypatch.setattr(diagnosis, "OF_MACHINE", {"broken": lambda setting: (_ for _ in ()).throw(PSAError("x; do y"))})
    assert [each.said for each in diagnose(Setting())] == ["x; do y"]
