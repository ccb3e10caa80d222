"""Every key of every configuration, with values that it may not have: refused by name before any work."""

import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from psa_jax.cli import main
from psa_jax.data.shards import INFO_FILE
from psa_jax.errors import PSAError
from psa_jax.interop import diffusers
from psa_jax.mini import base_model, prepare
from psa_jax.preference.objective import Objective
from psa_jax.tools import demo, memory, train
from psa_jax.tools.configs import read_config
from psa_jax.training import loop, lowered, run, setup
from psa_jax.training.optimizer import make_optimizer
from psa_jax.training.settings import EVERY_RULE, PATHS, validate, validate_devices

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TINY = CONFIGS / "tiny.py"
CASES = [
    ("tiny", "", "demo"),
    ("tiny", "smoke", "train"),
    ("tiny", "", "pretrain"),
    *((name, mode, "train") for name in ("sd15", "sd21", "sdxl") for mode in ("", "dpo", "paper", "smoke")),
]
VALUES = (0, -1, "x", math.nan, math.inf, None, True, "")
# One value where two belong together, or none where one of two would do: the other one is named.
OTHER = {"data.shards": "data.table", "data.table": "data.shards", "data.mini.users": "data.shards"}


@pytest.fixture
def no_work(monkeypatch):
    """Fails where weights are read, data is drawn, or a step is made."""

    def refuse(*args, **kwargs):
        pytest.fail("work was begun")

    for module in (diffusers, demo, memory, loop, lowered, run, setup, base_model, prepare, train):
        for name in ("load_stable_diffusion", "render_mini", "build_for_model", "MiniSet", "make_step", "open_shards"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def complete(tmp_path):
    """Returns a function: a configuration and its mode -> it, with a model and data where it leaves them open."""
    (tmp_path / INFO_FILE).touch()
    (tmp_path / "table.safetensors").touch()

    def read(name: str, mode: str) -> ml_collections.ConfigDict:
        config = read_config(f"{CONFIGS / name}.py" + (f":{mode}" if mode else ""))
        if name != "tiny":
            config.model, config.data.shards = "tiny", str(tmp_path)
            config.data.table = str(tmp_path / "table.safetensors")
            config.adapter.pooled = False  # tiny has no pooled text
        return config

    return read


def leaves(group: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in group.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def changed(config: ml_collections.ConfigDict, key: str, value) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    *groups, leaf = key.split(".")
    holder = config
    for group in groups:
        holder = holder[group]
    if type(value) is int and (holder.get_type(leaf) is float or leaf == "sdpo_mu"):
        value = float(value)  # as the command line reads it
    with holder.ignore_type():
        holder[leaf] = value
    return config


def found(config: ml_collections.ConfigDict, key: str):
    for name in key.split("."):
        config = config[name]
    return config


@pytest.mark.parametrize(("name", "mode", "command"), CASES)
def test_every_key_with_every_kind_of_value(complete, no_work, name: str, mode: str, command: str):
    config = complete(name, mode)
    validate(config, command)
    for key in leaves(config):
        for value in VALUES:
            other = changed(config, key, value)
            try:
                validate(other, command)
            except PSAError as error:
                assert key.rpartition(".")[2] in str(error) or OTHER.get(key, key) in str(error), f"{key} = {value!r}"
                assert "\n" not in str(error)
                continue
            assert EVERY_RULE[key].holds(found(other, key)), f"{key} = {value!r} is taken"
            if command != "pretrain":
                constructed(other, key)


def constructed(config: ml_collections.ConfigDict, key: str) -> None:
    """What was taken can be made use of: a mesh or one line about it, an objective, a finite step of the optimizer."""
    try:
        validate_devices(config)
    except PSAError as error:
        assert key in str(error) or key.startswith("mesh.")
    Objective(**config.objective)
    if key.startswith("optimizer."):
        params = {"weight": jnp.ones((2, 2))}
        optimizer = make_optimizer(config.optimizer, config.steps)
        with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
            updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert jnp.isfinite(updates["weight"]).all(), key


def test_every_key_has_a_rule(complete):
    for name, mode, _ in CASES:
        assert set(leaves(complete(name, mode))) <= set(EVERY_RULE)
    assert set(EVERY_RULE) == set(leaves(complete("tiny", "")))


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("value", ["gs://bucket/x", "a\0b"])
def test_paths_are_of_this_machine(complete, key: str, value: str):
    with pytest.raises(PSAError, match=f"^{key}: .*path"):
        validate(changed(complete("tiny", ""), key, value), "train")


@pytest.mark.parametrize("command", ["train", "demo", "memory", "bench"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("steps=-5", "steps is -5; give a whole number from 1 to 2147483647"),
        ("objective.loss=dpo", "objective.loss is 'dpo'; choose sigmoid, "),
        ("adapter.kind=lora", "adapter.kind is 'lora'; give one of published, text, concept, prompt"),
        ("adapter.tokens=0", "adapter.tokens is 0; give a whole number from 1 to 65536"),
        ("adapter.pooled=true", "adapter.pooled is given, which the text kind lacks; set it to false, or use"),
        ("dtype=float8", "dtype is 'float8'; give one of float32, bfloat16, float16"),
        ("log_every=0", "log_every is 0; give a whole number from 1 to 2147483647"),
        ("checkpoint_every=0", "checkpoint_every is 0; give a whole number from 1 to 2147483647"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate is -1.0; give a finite number above 0"),
        ("optimizer.warmup_steps=900", "optimizer: 900 warm-up and 2 decay steps do not fit into 4 steps"),
        ("data.safe_share=1", "data.safe_share is 1.0; give a finite number of 0 or more and below 1"),
        (f"steps={10**30}", f"steps is {10**30}; give a whole number from 1 to 2147483647"),
        (f"batch_size={2**31}", "batch_size is 2147483648; give a whole number from 1 to 2147483647"),
        (f"steps={'9' * 5000}", f"--config.steps: '{'9' * 79}… does not fit; give a value of type int, such as "),
        ("adapter.tokens=65537", "adapter.tokens is 65537; give a whole number from 0 to 65536"),
        (f"adapter.qk_dim={10**12}", f"adapter.qk_dim is {10**12}; give a whole number from 1 to 65536, or none"),
        ("adapter.qk_dim=nan", "--config.adapter.qk_dim: 'nan' does not fit; give a value of type int, or none"),
        (
            f"adapter.qk_dim={'9' * 5000}",
            f"--config.adapter.qk_dim: '{'9' * 79}… does not fit; give a value of type int, or none",
        ),
        (
            f"adapter.qk_dim={'-' * 50_000}1",
            f"--config.adapter.qk_dim: '{'-' * 79}… does not fit; give a value of type int, or none",
        ),
        (f"adapter.kind={'x' * 5000}", f"adapter.kind is '{'x' * 79}…; give one of published"),
        (f"objective.loss={'x' * 5000}", f"objective.loss is '{'x' * 79}…; choose sigmoid"),
        (f"mesh.data={2**31}", "mesh.data is 2147483648; give a whole number from 1 to 65536, or -1 for all"),
        ("data.shards=a\udcff", "data.shards: 'a\\udcff': a path that is not UTF-8"),
        ("model=gs://bucket", "model: gs://bucket: a whole bucket; give a folder in it, such as "),
        (
            "reference.folder=gs://bkt/x",
            "reference.folder: gs://bkt/x: only paths on this machine can be used here; give one",
        ),
    ],
)
def test_a_command_says_it_first(no_work, capsys, tmp_path, command: str, setting: str, said: str):
    workdir = [] if command in ("memory", "bench") else [f"--workdir={tmp_path / 'run'}"]
    what = ["step"] if command == "bench" else []
    assert main([command, *what, f"--config={TINY}:dpo-smoke", *workdir, f"--config.{setting}"]) == 1
    written, error = capsys.readouterr()
    assert error.startswith(f"psa-jax: error: {said}") and error.count("\n") == 1
    assert written == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["mesh.data=9"], "mesh.data = 9, mesh.fsdp = 1: there are 8 devices"),
        (["mesh.data=3"], "batch_size = 4 cannot be divided into accumulate = 1 parts on 3 devices; use a multiple"),
        (["validate.every=1", "mesh.data=2", "validate.batch_size=1"], "validate.batch_size is 1; give a multiple of "),
        (["validate.every=1", "validate.rows=3"], "validate: 3 held-out rows do not fill a batch of 16; lower "),
        (["sample_every=1", "mesh.fsdp=2", "mesh.frozen=split"], "sample_every = 1 draws on one device, and with "),
        (["accumulate=2", "objective.loss=kto"], "accumulate = 2: kto compares pairs of a batch; set accumulate to 1"),
        (["adapter.kind=published", "adapter.qk_dim=4"], "adapter.qk_dim is 4, which does not apply to the published"),
        (["adapter.kind=edit", "adapter.pooled=true"], "adapter.pooled is true, but the base model takes no pooled"),
        (["adapter.qk_dim=3"], "qk_dim 3 is no positive multiple of the heads of every layer ([4])"),
        (["reference.draws=1", "objective.loss=mapo"], "reference.draws is 1, but mapo runs no reference; set it to 0"),
    ],
)
def test_what_does_not_fit_together(no_work, capsys, tmp_path, settings: list[str], said: str):
    words = [f"--config.{setting}" for setting in settings]
    assert main(["train", f"--config={TINY}:dpo-smoke", f"--workdir={tmp_path / 'run'}", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"psa-jax: error: {said}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "demo", "pretrain"])
@pytest.mark.parametrize("place", ["users.csv", "users.csv/run", "link"])
def test_a_workdir_that_cannot_be_a_folder(no_work, capsys, tmp_path, command: str, place: str):
    (tmp_path / "users.csv").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main([command, f"--config={TINY}:dpo-smoke", f"--workdir={tmp_path / place}"]) == 1
    said = tmp_path / place.partition("/")[0]
    assert capsys.readouterr().err == (
        f"psa-jax: error: {said}: not a folder; give a --workdir that is one, or is not there yet\n"
    )
    assert (tmp_path / "users.csv").read_text() == "mine" and not (tmp_path / "nowhere").exists()


# --- data by path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["shards=/no/such", "table=/no/such.safetensors"], "data.shards is /no/such, where no shards are; make them "),
        (["shards=DATA", "table=/no/such.safetensors"], "data.table is /no/such.safetensors, which is not there; make"),
        (["shards=DATA"], "the configuration leaves data.table open; give --config.data.table=PATH"),
        (["table=DATA/table.safetensors"], "the configuration leaves data.shards open; give --config.data.shards=PATH"),
        (["shards=gs://me:secret@bucket/x", "table=t"], "data.shards: gs://…: an address with credentials, a port or "),
        (["mini.users=0"], "the configuration leaves data.shards open; give --config.data.shards=PATH"),
    ],
)
def test_data_that_is_named_is_used_or_refused(complete, no_work, capsys, tmp_path, settings: list[str], said: str):
    """configs/tiny.py draws its own where none is named."""
    words = [f"--config.data.{setting}".replace("DATA", str(tmp_path)) for setting in settings]
    assert main(["train", f"--config={TINY}:dpo-smoke", f"--workdir={tmp_path / 'run'}", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"psa-jax: error: {said}") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_that_is_named_is_what_is_trained_on(complete, no_work, tmp_path):
    config = complete("tiny", "smoke")
    named = changed(changed(config, "data.shards", str(tmp_path)), "data.table", str(tmp_path / "table.safetensors"))
    validate(named, "train")
    assert named.data.mini.users and prepare.with_mini(named, tmp_path / "data") is named


@pytest.mark.parametrize("key", ["shards", "table"])
def test_the_demo_judges_by_data_of_its_own(no_work, capsys, tmp_path, key: str):
    words = [f"--workdir={tmp_path / 'run'}", f"--config.data.{key}={tmp_path}"]
    assert main(["demo", f"--config={TINY}:dpo-smoke", *words]) == 1
    assert f"error: data.{key} is {tmp_path}, but the demo draws its own data, " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
