"""What can keep a training from starting on this machine, each part looked at by itself.

A check is one function and one row of a table. It returns what it found in one line, or raises a PSAError, which says
what is missing and what mends it.
"""

import dataclasses
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import jax
import ml_collections
from packaging.requirements import Requirement

from psa_jax.compiled import VARIABLE
from psa_jax.data.fingerprints import vae_fingerprint
from psa_jax.data.shards import open_shards, preprocess_of, read_info
from psa_jax.errors import PSAError
from psa_jax.files import write
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import MODELS
from psa_jax.paths import Address, check_workdir
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.remote import Bucket, cache_folder
from psa_jax.training.settings import validate, validate_devices

LEAST_ROOM = 1 << 30
"""Bytes of disk below which a run is not worth starting."""
DEVICES = Path("/dev")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is looked at.

    Attributes:
      config: of a training; None for the machine alone.
      workdir: of the training; None for the current folder.
    """

    config: ml_collections.ConfigDict | None = None
    workdir: Path | Address | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
      name: of the check.
      well: whether nothing is missing.
      said: one line.
    """

    name: str
    well: bool
    said: str


def diagnose(setting: Setting) -> list[Finding]:
    """Runs all checks that the setting has something for; one that fails does not keep the others from running."""
    checks = dict(OF_MACHINE)
    if setting.config is not None:
        checks |= OF_CONFIG
        if setting.config.data.get("shards"):
            checks |= OF_DATA
    found = []
    for name, check in checks.items():
        try:
            found.append(Finding(name, True, check(setting)))
        except PSAError as error:  # what is missing is what this is for: it is said, and the command fails
            found.append(Finding(name, False, str(error)))
    return found


# --- the machine


def packages(_: Setting) -> str:
    """Versions of psa_jax and its requirements.

    Raises:
      PSAError: one is missing, or outside the range that psa_jax or jax asks for.
    """
    for package in ("psa_jax", "jax"):
        for requirement in _requirements(package, ""):
            _check_installed(requirement)
    shown = ("psa_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in shown)])


def devices(_: Setting) -> str:
    """The devices that JAX uses, with their memory where they say it.

    Raises:
      PSAError: there is an accelerator that JAX does not use.
    """
    found = _devices()
    if found[0].platform == "cpu":
        if any(DEVICES.glob("accel[0-9]*")):
            raise PSAError("a TPU is here and JAX uses the CPU; pip install 'psa_jax[tpu]'")
        if any(DEVICES.glob("nvidia[0-9]*")):
            raise PSAError(f"an NVIDIA GPU is here and JAX uses the CPU; pip install 'jax[cuda]=={jax.__version__}'")
    memory = (found[0].memory_stats() or {}).get("bytes_limit")
    each = f", {_gib(memory)} each" if memory else ""
    return f"{len(found)} × {found[0].device_kind}{each}; {jax.process_count()} process"


def libtpu(_: Setting) -> str:
    """The installed libtpu.

    Raises:
      PSAError: not the one that this jax goes with.
    """
    (wanted,) = (each for each in _requirements("jax", "tpu") if each.name == "libtpu")
    if _version("libtpu") is None:
        return "not installed; a TPU needs it, and psa-jax memory --topology: pip install 'psa_jax[tpu]'"
    _check_installed(wanted)
    return f"{version('libtpu')}, which goes with jax {jax.__version__}"


def room(setting: Setting) -> str:
    """Free disk where the run writes, and free memory.

    Raises:
      PSAError: less than `LEAST_ROOM` of disk.
    """
    place = cache_folder() if isinstance(setting.workdir, Address) else setting.workdir or Path.cwd()
    there = next(each for each in (place, *place.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < LEAST_ROOM:
        raise PSAError(f"{there}: {_gib(free)} of disk are free; make room, or give --workdir on another disk")
    known = {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys()
    memory = f", {_gib(os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} of memory free" if known else ""
    return f"{_gib(free)} of disk free at {there}{memory}, {os.cpu_count()} cores"


def cache(_: Setting) -> str:
    """Where JAX keeps what it has compiled.

    Raises:
      PSAError: a folder that cannot be written.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"none; with {VARIABLE}=FOLDER in the environment a second start does not compile again"
    if "://" not in folder:
        there = next(each for each in (Path(folder), *Path(folder).absolute().parents) if each.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise PSAError(f"{VARIABLE} is {folder}, which cannot be written; give a folder that can")
    return folder


# --- a configuration


def configuration(setting: Setting) -> str:
    """Every value of the configuration, as `psa-jax train` checks it.

    Raises:
      PSAError: the first mistake.
    """
    config = setting.config
    validate(config, "train", None if isinstance(setting.workdir, Address) else setting.workdir)
    return f"{config.adapter.kind}, {config.steps} steps of {config.batch_size} pairs in {config.dtype}"


def mesh(setting: Setting) -> str:
    """The mesh on the devices that are here, and each one's share of a step.

    Raises:
      PSAError: it does not fit them.
    """
    _devices()
    try:
        made = validate_devices(setting.config)
    except PSAError as error:
        if jax.process_count() > 1:
            raise
        raise PSAError(
            f"{error} (these are the devices of this host alone; a pod has those of all its hosts)"
        ) from error
    axes = ", ".join(f"{name} {size}" for name, size in made.shape.items())
    return f"{axes}: {setting.config.batch_size // made.size} pairs of a step on each of {made.size} devices"


def base_model(setting: Setting) -> str:
    """The base model's files: all parts are there and can be opened; weights other than the VAE's are not read.

    Raises:
      PSAError: the first that is missing or wrong.
    """
    model = BaseModel.from_config(setting.config).load(abstract=tuple(name for name in MODELS if name != "vae"))
    return f"{setting.config.model}: {model.family}, {model.picture_size[0]} × {model.picture_size[1]} pixels"


def workdir(setting: Setting) -> str:
    """Whether files can be written where the run writes.

    Raises:
      PSAError: they cannot.
    """
    place = setting.workdir
    if place is None:
        return "not given; --workdir=DIR checks it, too"
    if isinstance(place, Address):
        Bucket(place).probe()
        return f"{place}: can be written"
    check_workdir(place)
    there = next(each for each in (place, *place.absolute().parents) if each.exists())
    probe = there / f".psa-jax-doctor-{os.getpid()}"
    write(probe, b"")
    probe.unlink()
    return f"{place}: can be written" + (", holds an earlier run" if (place / "metrics.jsonl").exists() else "")


def shards(setting: Setting) -> str:
    """The shards' rows, files and fingerprint, which is that of the base model's VAE.

    Raises:
      PSAError: shards that cannot be read, or of another VAE.
    """
    folder = Path(setting.config.data.shards)
    info = read_info(folder)
    model = BaseModel.from_config(setting.config).load(abstract=tuple(name for name in MODELS if name != "vae"))
    fingerprint = vae_fingerprint(model.vae_tensors, preprocess_of(info))
    for split in info["splits"]:
        open_shards(folder, split, fingerprint)
    rows = ", ".join(f"{split} {count}" for split, count in info["splits"].items())
    return f"rows: {rows}; {info['resolution']} pixels, {info['family']}, of the base model's VAE"


def table(setting: Setting) -> str:
    """The table of embeddings, which has all users of the shards.

    Raises:
      PSAError: it cannot be read, or lacks users.
    """
    if not setting.config.data.table:
        raise PSAError("data.table is not set; give --config.data.table=FILE")
    path, folder = Path(setting.config.data.table), Path(setting.config.data.shards)
    loaded = EmbeddingTable.load(path)
    users = {user for split in read_info(folder)["splits"] for user in open_shards(folder, split).columns.user_ids}
    if missing := users - set(loaded.ids):  # counted, not named
        raise PSAError(f"{path}: lacks {len(missing)} users of {folder}; psa-jax encode --add adds them")
    return f"{len(loaded.ids)} users, {loaded.dim} numbers each, encoder {loaded.encoder}; all of the shards' users"


Check = Callable[[Setting], str]
OF_MACHINE: Mapping[str, Check] = {
    "packages": packages,
    "devices": devices,
    "libtpu": libtpu,
    "room": room,
    "cache": cache,
}
OF_CONFIG: Mapping[str, Check] = {
    "configuration": configuration,
    "mesh": mesh,
    "base model": base_model,
    "workdir": workdir,
}
OF_DATA: Mapping[str, Check] = {"shards": shards, "table": table}


def _devices() -> list[jax.Device]:
    """The devices of JAX.

    Raises:
      PSAError: the platform that it is told to use does not start.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise PSAError(
            f"JAX does not start ({reason}); JAX_PLATFORMS is {asked!r}: unset it, or install what it names"
        ) from error


def _requirements(package: str, extra: str) -> list[Requirement]:
    """What a package asks for on this Python, with an extra or without any."""
    found = [Requirement(line) for line in requires(package) or []]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": extra})]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_installed(wanted: Requirement) -> None:
    found = _version(wanted.name)
    if found is None or not wanted.specifier.contains(found, prereleases=True):
        has = "is not installed" if found is None else f"is {found}"
        raise PSAError(f"{wanted.name} {has}; pip install '{wanted.name}{wanted.specifier}'")


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
