"""Sharding: a mesh (data, fsdp), batches split over both axes, other arrays by a table of rules."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from psa_jax.errors import PSAError

DATA, FSDP = "data", "fsdp"
ROWS = (DATA, FSDP)

REPLICATED, SPLIT = "replicated", "split"
_MATRICES = r"(^|/)(kernel|embedding)$"
_STATE = r"^(params|ema|opt_state)/"
_BLOCKS = r"/(resnets|transformer_blocks)/"
RULES = {
    REPLICATED: ((_STATE, SPLIT), (r"", REPLICATED)),
    SPLIT: ((_STATE, SPLIT), (_MATRICES, SPLIT), (r"", REPLICATED)),
}
"""Choice for the frozen weights → (pattern, placement); the first pattern found in an array's name decides.

`split` divides an array of at least two axes over `fsdp`, along the longest axis that can be divided. Frozen weights of
a UNet's residual and transformer blocks are gathered when the block runs, and again for its backward pass; the others,
a small part, once for all of it.
"""


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None, slices: int = 1) -> Mesh:
    """A mesh of data × fsdp devices (default: of all processes); `data` = −1 takes all that there are.

    Slices share no fast network, so that matrices are divided inside one and only gradients, along `data`, go between
    them: the rows of the first slice come first, then those of the next.

    Args:
      data, fsdp: sizes of the two axes, over all slices.
      devices: to be used.
      slices: TPU slices, or on CPUs as many equal groups of processes, which stand for slices.

    Raises:
      PSAError: sizes that do not fit the devices or their slices.
    """
    available = jax.devices() if devices is None else list(devices)
    if fsdp < 1:
        raise PSAError(f"mesh.fsdp = {fsdp}; give 1 or more devices")
    rows = len(available) // fsdp if data == -1 else data
    if data == -1 and len(available) % fsdp:
        raise PSAError(f"mesh.fsdp = {fsdp}: {len(available)} devices cannot be divided by it; give mesh.data, too")
    if not 1 <= rows * fsdp <= len(available):
        raise PSAError(f"mesh.data = {data}, mesh.fsdp = {fsdp}: there are {len(available)} devices")
    groups = slices_of(available, slices)
    # Convolutions with sharded operands need Auto axes; jax.make_mesh makes Explicit ones by default.
    axes: dict[str, Any] = {"axis_types": (AxisType.Auto,) * 2}
    if slices == 1:
        return jax.make_mesh((rows, fsdp), ROWS, devices=available[: rows * fsdp], **axes)
    size = len(groups[0])
    if size % fsdp or rows * fsdp != len(available):
        raise PSAError(
            f"mesh.data = {data}, mesh.fsdp = {fsdp}, mesh.slices = {slices}: each slice has {size} devices, all of "
            "which are used and are divided by mesh.fsdp; give mesh.data = -1 and another mesh.fsdp"
        )
    placed = [mesh_utils.create_device_mesh((size // fsdp, fsdp), group) for group in groups]
    return Mesh(np.concatenate(placed), ROWS, **axes)


def slices_of(devices: Sequence[Any], slices: int) -> list[list[Any]]:
    """The devices of each slice, slices in their order.

    Args:
      devices: of all processes. TPU devices say which slice they are of; CPU devices do not, and are taken in order.
      slices: how many there have to be.

    Raises:
      PSAError: the devices are of another number of slices, or of slices of several sizes.
    """
    found: dict[int, list[Any]] = {}
    for number, device in enumerate(devices):
        of_cpu = number * slices // len(devices)
        found.setdefault(of_cpu if device.platform == "cpu" else getattr(device, "slice_index", 0), []).append(device)
    # A GPU calls each host a slice, and whoever asks for one slice takes them together.
    if slices == 1 and devices[0].platform != "tpu":
        return [list(devices)]
    if len(found) != slices:
        raise PSAError(f"mesh.slices = {slices}: the devices are of {len(found)}; give mesh.slices = {len(found)}")
    if len({len(group) for group in found.values()}) > 1:
        sizes = ", ".join(str(len(found[index])) for index in sorted(found))
        raise PSAError(f"mesh.slices = {slices}: the slices have {sizes} devices; all need equally many")
    return [found[index] for index in sorted(found)]


def check_batch(pairs: int, mesh: Mesh, accumulate: int) -> None:
    """Raises PSAError unless every device gets equally many pairs of every part of a step."""
    if accumulate < 1 or pairs < 1 or pairs % (mesh.size * accumulate):
        raise PSAError(
            f"batch_size = {pairs} cannot be divided into accumulate = {accumulate} parts on {mesh.size} devices; "
            f"use a multiple of {mesh.size * max(accumulate, 1)}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def constrained(array: jax.Array, where: NamedSharding) -> jax.Array:
    """The array, placed there; inside `jax.shard_map`, where each device works on its own, as it is."""
    return array if _by_device() else jax.lax.with_sharding_constraint(array, where)


def divided_axis(where: NamedSharding) -> int | None:
    """The axis that is divided over `fsdp`; None for an array that is whole on each device."""
    return where.spec.index(FSDP) if FSDP in where.spec else None


def mean_in_parts(array: jax.Array, where: NamedSharding) -> jax.Array:
    """The array, placed where it is divided over `fsdp`; inside `jax.shard_map` this device's part of the mean."""
    axis = divided_axis(where)
    if axis is None or not _by_device():
        return constrained(array, where)
    total = jax.lax.psum_scatter(array, FSDP, scatter_dimension=axis, tiled=True)
    return total / where.mesh.shape[FSDP]


def _by_device() -> bool:
    """Whether what is traced is one device's part of a `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def array_name(path: tuple[Any, ...]) -> str:
    """Name of an array in a tree, such as `weights/0/conv_in/kernel`, from its path there."""
    # A parameter of a model is an object with one array in it, whose path has one more step than its name.
    steps = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", step)))) for step in path]
    return "/".join(step for step in steps if step != "value")


def placement(name: str, shape: tuple[int, ...], mesh: Mesh, frozen_sharding: str = REPLICATED) -> NamedSharding:
    """The sharding of one array, by its name and shape.

    Args:
      name: its path in the state (`params/…`, `ema/…`, `opt_state/…`) or in the frozen weights.
      frozen_sharding: a key of `RULES`.
    """
    if frozen_sharding not in RULES:
        raise PSAError(f"mesh.frozen = {frozen_sharding!r} is unknown; use one of {', '.join(RULES)}")
    rule = next(rule for pattern, rule in RULES[frozen_sharding] if re.search(pattern, name))
    return NamedSharding(mesh, _split(shape, mesh.shape[FSDP]) if rule == SPLIT else PartitionSpec())


def shardings(tree: Any, mesh: Mesh, frozen_sharding: str = REPLICATED) -> Any:
    """`placement` of every array of a tree, which may be abstract."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: placement(array_name(path), np.shape(leaf), mesh, frozen_sharding), tree
    )


def whole_but_blocks(weights: Any, whole: Callable[[jax.Array], jax.Array]) -> Any:
    """Frozen weights, gathered but for those of a UNet's blocks, which gather their own when they run."""

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf if re.search(_BLOCKS, array_name(path)) else whole(leaf)

    return jax.tree_util.tree_map_with_path(place, weights)


def weight_sharding(mesh: Mesh, frozen_sharding: str) -> Callable[[tuple[Any, ...], tuple[int, ...]], NamedSharding]:
    """`placement` as `load_stable_diffusion` takes it: each process reads only what its devices hold."""
    return lambda path, shape: placement("/".join(map(str, path)), shape, mesh, frozen_sharding)


def _split(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if len(shape) < 2 or not axes or parts == 1:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(FSDP if axis == longest else None for axis in range(len(shape))))
