"""A table of all keys of a configuration and their values, to report a mistake before any work."""

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from psa_jax.data.balancing import BALANCES
from psa_jax.data.shards import INFO_FILE
from psa_jax.diffusion.generate import UNCONDITIONAL
from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import find_adapter
from psa_jax.interop.base_model import BaseModel
from psa_jax.models.adapter_config import (
    ADAPTER_KINDS,
    ADDED_SIZES,
    GATES,
    AdapterConfig,
    check_gate,
    check_kind,
    check_mixing,
    check_pooled,
)
from psa_jax.models.attention import REMAT
from psa_jax.paths import check_workdir, local_path
from psa_jax.preference.draws import fixed_draws_or_none
from psa_jax.preference.losses import LOSSES
from psa_jax.preference.objective import Objective
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.rules import (
    COUNT,
    COUNT_OR_NONE,
    DECAY,
    DTYPES,
    FINITE,
    MOST_SIZE,
    RATE,
    SEED,
    SHARE,
    SIZE,
    WEIGHT,
    Rule,
    any_of,
    number,
    optional,
    quoted,
    whole,
)
from psa_jax.training.optimizer import DECAYED, OPTIMIZERS, SCHEDULES, make_optimizer
from psa_jax.training.sharding import REPLICATED, RULES, check_batch, make_mesh

NAME = Rule(lambda value: isinstance(value, str), "a name")
FLAG = Rule(lambda value: type(value) is bool, "true or false")
PLACE = Rule(lambda value: isinstance(value, str), "a path")
ALL_OR_SIZE = Rule(lambda value: whole(-1, -1).holds(value) or SIZE.holds(value), f"{SIZE.wanted}, or -1 for all")
WIDTHS = Rule(
    lambda value: isinstance(value, tuple | list) and len(value) > 0 and all(SIZE.holds(each) for each in value),
    f"whole numbers from 1 to {MOST_SIZE}, such as (32, 64)",
)

# Ranges are the objective's own: it refuses what is outside of them.
_OF_OBJECTIVE = {
    "float": FINITE,
    "float | None": optional(FINITE),
    "str": Rule(lambda value: isinstance(value, str), "a name"),
}

_PHASE = {"steps": COUNT, "batch_size": COUNT, "learning_rate": RATE, "weight_decay": WEIGHT, "seed": SEED}
_AVERAGED = _PHASE | {"ema": DECAY}


def _under(group: str, rules: dict[str, Rule]) -> dict[str, Rule]:
    return {f"{group}.{key}": rule for key, rule in rules.items()}


def _type_name(field: dataclasses.Field) -> str:
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


TRAINING: dict[str, Rule] = {
    "seed": SEED,
    "model": PLACE,
    "steps": COUNT,
    "batch_size": COUNT,
    "log_every": COUNT,
    "checkpoint_every": COUNT,
    "keep_checkpoints": COUNT,
    "keep_best": COUNT_OR_NONE,
    "validate.every": COUNT_OR_NONE,
    "validate.rows": COUNT,
    "validate.batch_size": COUNT,
    "alarm_window": COUNT_OR_NONE,
    "hang_timeout": WEIGHT,
    "wandb": FLAG,
    "sample_every": COUNT_OR_NONE,
    "mesh.data": ALL_OR_SIZE,
    "mesh.fsdp": SIZE,
    "mesh.frozen": any_of(RULES),
    "accumulate": COUNT,
    "remat": any_of(REMAT),
    "dtype": any_of(DTYPES),
    "adapter.kind": any_of(ADAPTER_KINDS),
    "adapter.tokens": whole(0, MOST_SIZE),  # 0 with the gate by categories
    "adapter.qk_dim": optional(SIZE),
    "reference.draws": COUNT_OR_NONE,
    "reference.seed": SEED,
    "reference.folder": PLACE,
    "optimizer.name": any_of(OPTIMIZERS),
    "optimizer.learning_rate": RATE,
    "optimizer.warmup_steps": COUNT_OR_NONE,
    "optimizer.schedule": any_of(SCHEDULES),
    "optimizer.decay_share": SHARE,
    "optimizer.b2": DECAY,
    "optimizer.weight_decay": WEIGHT,
    "optimizer.decayed": any_of(DECAYED),
    "optimizer.clip_norm": RATE,
    "optimizer.ema": DECAY,
    "data.shards": PLACE,
    "data.table": PLACE,
    "data.balance": any_of(BALANCES),
    "data.safe_share": DECAY,
    "data.mini.users": COUNT_OR_NONE,
    "data.mini.seed": SEED,
}
OBJECTIVE: dict[str, Rule] = {
    f"objective.{field.name}": _OF_OBJECTIVE[_type_name(field)] for field in dataclasses.fields(Objective)
}
"""A configuration may leave these out: `Objective` has defaults, and a later version may have more of them."""
EVALUATION: dict[str, Rule] = {
    "evaluate.per_rate.unseen": COUNT,
    "evaluate.per_rate.seen": COUNT,
    "evaluate.steps": COUNT,
    "evaluate.guidance": number(),
    "evaluate.unconditional": any_of(UNCONDITIONAL),
    "evaluate.batch_size": COUNT,
}
PRETRAINING: dict[str, Rule] = _under(
    "pretrain",
    {
        "start": PLACE,
        "pictures": COUNT,
        "held_out": COUNT,
        "samples": COUNT,
        "data_seed": whole(0, 2**32 - 4),  # seeds up to 3 above it are used, too
        **dict.fromkeys(("text.hidden_size", "text.layers", "text.heads", "text.length"), SIZE),
        "unet.widths": WIDTHS,
        "unet.heads": SIZE,
        "vae.widths": WIDTHS,
        "vae.kl_weight": WEIGHT,
        **_under("vae.crops", _PHASE | {"size": SIZE}),
        **_under("vae.whole", _PHASE | {"size": SIZE}),
        **_under("oracle", _AVERAGED | {"decoded": COUNT}),
        "min_snr": RATE,
        "text_dropout": SHARE,
        **_under("denoiser", _AVERAGED | {"seed": whole(0, 2**32 - 2)}),  # the UNet has the next one
        **_under("restart", _AVERAGED),
    },
)
OPTIONAL: dict[str, Rule] = {
    "init_from": PLACE,
    "mesh.slices": SIZE,
    "adapter.hidden": optional(SIZE),
    "adapter.mixing": FLAG,
    "adapter.pooled": FLAG,
    "adapter.gate": any_of(GATES),
    "data.banned_share": SHARE,
    "evaluate.per_rate.harder": COUNT_OR_NONE,
}
"""Keys that a configuration may leave out, which then have their defaults."""
BASE_MODEL: dict[str, Rule] = {"variant": NAME, **dict.fromkeys(("vae", "tokenizer", "model_config"), PLACE)}
"""What may stand beside `model`; a configuration without these keys is one that leaves them empty."""
RULES_OF: dict[str, dict[str, Rule]] = {
    "train": TRAINING,
    "memory": TRAINING,
    "aot": TRAINING,
    "bench step": TRAINING,
    "demo": TRAINING | EVALUATION,
    "pretrain": PRETRAINING,
}
"""Keys that a command needs. Other keys are checked where this file knows them."""
EVERY_RULE = TRAINING | OBJECTIVE | OPTIONAL | BASE_MODEL | EVALUATION | PRETRAINING
PATHS = tuple(key for key, rule in EVERY_RULE.items() if rule is PLACE)
_ABSENT = object()


def validate(config: ml_collections.ConfigDict, command: str, workdir: Path | None = None) -> None:
    """Checks every value, and that they fit together, without reading data or weights or starting a device.

    Args:
      command: a key of `RULES_OF`.
      workdir: where checkpoints would be written.

    Raises:
      PSAError: the first mistake, by its key.
    """
    required = RULES_OF[command]
    for key, rule in EVERY_RULE.items():
        value = _value(config, key)
        if value is _ABSENT:
            if key in required:
                raise PSAError(f"the configuration has no {key}; give it {rule.wanted}")
        elif not rule.holds(value):
            raise PSAError(f"{key} is {quoted(value)}; give {rule.wanted}")
        elif rule is PLACE and value:
            _named(key, local_path, value)
    if workdir is not None:
        check_workdir(workdir)
    if command == "pretrain":
        return
    _require_known(config.objective, "objective", [field.name for field in dataclasses.fields(Objective)])
    _require_known(config.adapter, "adapter", ["kind", "tokens", "qk_dim", *ADDED_SIZES])
    adapter = ADDED_SIZES | config.adapter.to_dict()
    check_kind(adapter["kind"], adapter["qk_dim"], adapter["hidden"])
    check_mixing(adapter["kind"], adapter["mixing"])
    check_pooled(adapter["kind"], adapter["pooled"])
    check_gate(adapter["kind"], adapter["gate"], adapter["tokens"], adapter["qk_dim"])
    if not adapter["tokens"] and adapter["gate"] != "categories":
        raise PSAError(f"adapter.tokens is 0; give {SIZE.wanted}")
    if config.get("init_from"):
        _named("init_from", find_adapter, local_path(config.init_from))
    objective = Objective(**config.objective)
    fixed_draws_or_none(config.reference.draws, config.reference.seed, objective, flips=False)
    check_accumulate(objective, config.accumulate)
    make_optimizer(config.optimizer, config.steps)
    if config.sample_every and config.mesh.frozen != REPLICATED and config.mesh.fsdp != 1:
        raise PSAError(
            f"sample_every = {config.sample_every} draws on one device, and with mesh.frozen = {config.mesh.frozen} "
            "none has the whole model; set it to 0 and draw with psa-jax generate"
        )
    if config.validate.every and config.validate.rows < config.validate.batch_size:
        raise PSAError(
            f"validate: {config.validate.rows} held-out rows do not fill a batch of {config.validate.batch_size}; "
            "lower validate.batch_size or raise validate.rows"
        )
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise PSAError("wandb is asked for and not installed; pip install wandb, or --config.wandb=false")
    base = BaseModel.from_config(config)
    base.check()
    # Must suit the base model, whose weights take long to read.
    if config.adapter.qk_dim is not None or adapter["pooled"]:
        AdapterConfig.for_unet(base.unet_config(), user_dim=1, **config.adapter)
    if command in ("train", "demo"):
        _check_data(config, command)


def validate_devices(config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Checks mesh and batches against the devices (default: of all processes, which have joined).

    Returns:
      The mesh.

    Raises:
      PSAError: too few devices, a process that has none of them, or a batch that they cannot share evenly.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices, config.mesh.get("slices", 1))
    if devices is None:
        used = {device.process_index for device in mesh.devices.flat}
        if len(used) < jax.process_count():
            raise PSAError(
                f"mesh.data = {config.mesh.data}, mesh.fsdp = {config.mesh.fsdp}: {mesh.size} of the "
                f"{len(jax.devices())} devices, which are of {len(used)} of the {jax.process_count()} processes; "
                f"give mesh.data = -1 for all"
            )
    check_batch(config.batch_size, mesh, config.accumulate)
    if config.validate.every and config.validate.batch_size % mesh.size:
        raise PSAError(
            f"validate.batch_size is {config.validate.batch_size}; give a multiple of the {mesh.size} devices"
        )
    return mesh


def user_dim(config: ml_collections.ConfigDict) -> int:
    """D of the profile embeddings: of the table that a configuration names, else of the `features` encoder.

    Raises:
      PSAError: a table that is named and cannot be read.
    """
    if config.data.table:
        return EmbeddingTable.load(Path(config.data.table)).dim
    return get_encoder("features").dim


def check_accumulate(objective: Objective, accumulate: int) -> None:
    """Raises PSAError where `accumulate` divides a batch whose loss compares all of its pairs."""
    if accumulate > 1 and LOSSES[objective.loss].whole_batch:
        raise PSAError(f"accumulate = {accumulate}: {objective.loss} compares pairs of a batch; set accumulate to 1")


def _value(config: ml_collections.ConfigDict, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = found[name] if isinstance(found, ml_collections.ConfigDict) and name in found else _ABSENT
    return found


def _require_known(group: ml_collections.ConfigDict, name: str, known: Sequence[str]) -> None:
    for key in group:
        if key not in known:
            raise PSAError(f"{name}.{key} is unknown; the keys of {name} are {', '.join(known)}")


def _named(key: str, check: Callable[[Any], object], value: Any) -> None:
    try:
        check(value)
    except PSAError as error:
        raise PSAError(f"{key}: {error}") from error


def _check_data(config: ml_collections.ConfigDict, command: str) -> None:
    data = config.data
    if command == "demo":
        for key in ("shards", "table"):
            if data[key]:
                raise PSAError(
                    f"data.{key} is {data[key]}, but the demo draws its own data, by which it judges; "
                    f"leave it empty, or train with psa-jax train"
                )
        if not data.mini.users:
            raise PSAError("data.mini.users is 0, but the demo draws its own data; give the number of users")
        return
    if data.mini.users and not data.shards and not data.table:
        return
    for key in ("shards", "table"):
        if not data[key]:
            raise PSAError(f"the configuration leaves data.{key} open; give --config.data.{key}=PATH")
    if not (Path(data.shards) / INFO_FILE).is_file():
        raise PSAError(f"data.shards is {data.shards}, where no shards are; make them with psa-jax build")
    if not Path(data.table).is_file():
        raise PSAError(f"data.table is {data.table}, which is not there; make it with psa-jax encode")
