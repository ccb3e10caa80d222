"""Models on many items: batches of one size, split over devices, with results item by item."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Float16, Float32, PyTree

from psa_jax.errors import PSAError


def encode_images(
    encode: Callable[[Float32[np.ndarray, "b h w 3"]], Float32[Array | np.ndarray, "b h2 w2 c2"]],
    images: Iterable[np.ndarray],
    batch_size: int,
) -> Iterator[Float16[np.ndarray, "h2 w2 c2"]]:
    """Encodes pictures in batches of one size, as `in_batches` does.

    Args:
      encode: pictures [b, h, w, 3] in [-1, 1] → moments [b, h/f, w/f, 2c].
      images: [h, w, 3] each, of one size; read on demand.
      batch_size: pictures in each call.

    Yields:
      The moments of each picture, in order: mean and log-variance [h/f, w/f, 2c], concatenated on the last axis.

    Raises:
      PSAError: moments of another batch size, or not finite in float16.
    """

    def checked(pixels):
        moments = encode(pixels)
        if moments.ndim != 4 or len(moments) != batch_size or moments.shape[-1] % 2:
            raise PSAError(f"encoder gave shape {moments.shape} for {batch_size} pictures; expected [b, h, w, 2c]")
        return moments

    for number, moments in enumerate(in_batches(checked, images, batch_size)):
        yield half(moments, f"moments of picture {number}")


def half(array: np.ndarray, what: str) -> Float16[np.ndarray, "..."]:
    """Converts an array to float16.

    Args:
      array: of any shape.
      what: the array's name, with which the error begins.

    Raises:
      PSAError: a number is not finite in float16.
    """
    with np.errstate(over="ignore"):  # an overflow is infinite, and refused below
        stored = array.astype(np.float16)
    if not np.isfinite(stored).all():
        raise PSAError(f"{what} are not finite in float16; check the model, which is to give numbers below 65504")
    return stored


def in_batches(
    function: Callable[[np.ndarray], PyTree], items: Iterable[np.ndarray], batch_size: int
) -> Iterator[PyTree]:
    """Calls `function` on stacked items and yields its results item by item, in order.

    Every call gets exactly `batch_size` items, so that jit compiles once: the last batch is padded with copies of its
    last item, and their results are dropped. Each call starts before the results of the call before it are fetched, so
    that an accelerator does not wait for the host.

    Args:
      function: [b, …] → a tree of arrays [b, …].
      items: arrays of one shape, read on demand.
      batch_size: b.

    Yields:
      For each item, the tree of its arrays, without the batch axis.

    Raises:
      PSAError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise PSAError(f"batch size for encoding is {batch_size}; give a number from 1 up")
    remaining, started = iter(items), None
    while batch := list(islice(remaining, batch_size)):
        filled = batch + [batch[-1]] * (batch_size - len(batch))
        before, started = started, (function(np.stack(filled)), len(batch))
        if before is not None:
            yield from _rows(*before)
    if started is not None:
        yield from _rows(*started)


def _rows(results: PyTree, count: int) -> Iterator[PyTree]:
    arrays = jax.tree.map(np.asarray, results)
    for row in range(count):
        yield jax.tree.map(lambda array, row=row: array[row], arrays)


def on_devices(
    function: Callable[..., PyTree], models: Any, batch_size: int, devices: list[jax.Device] | None = None
) -> Callable[[np.ndarray], PyTree]:
    """Compiles `function(models, batch)` with the batch split over devices, at full float32 precision.

    By default a TPU multiplies float32 numbers as bfloat16. Moments are computed once and kept, so precision is worth
    its time here.

    Args:
      function: (models, batch [b, …]) → a tree of arrays [b, …].
      models: NNX modules.
      batch_size: b.
      devices: to split the batch over; None takes those of this process.

    Returns:
      A function of the batch alone.

    Raises:
      PSAError: `batch_size` cannot be divided among the devices.
    """
    rows, whole = _placements(batch_size, devices)
    run, weights = _jitted(function, models)
    weights = jax.device_put(weights, whole)
    return lambda batch: run(weights, jax.device_put(batch, rows))


def lower_on_devices(
    function: Callable[..., PyTree], models: Any, batch: jax.ShapeDtypeStruct, devices: list[jax.Device]
) -> Lowered:
    """Lowers what `on_devices` compiles from shapes alone: weights and devices may be absent.

    Args:
      function: as in `on_devices`.
      models: NNX modules, whose weights may be shapes.
      batch: shape of a batch.
      devices: to split the batch over.

    Raises:
      PSAError: the batch cannot be divided among the devices.
    """
    rows, whole = _placements(batch.shape[0], devices)
    run, weights = _jitted(function, models)
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), weights)
    return run.lower(weights, jax.ShapeDtypeStruct(batch.shape, batch.dtype, sharding=rows))


def _placements(batch_size: int, devices: list[jax.Device] | None) -> tuple[NamedSharding, NamedSharding]:
    """Where rows of a batch and where weights live."""
    devices = jax.local_devices() if devices is None else devices
    if batch_size % len(devices):
        raise PSAError(f"batch size {batch_size} cannot be divided among {len(devices)} devices; use a multiple")
    # Auto axes, as in training: convolutions refuse Explicit ones.
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())


def _jitted(function: Callable[..., PyTree], models: Any) -> tuple[Any, nnx.State]:
    """The function of weights and a batch, and the weights."""
    graph, weights = nnx.split(models)

    @jax.jit
    def run(weights, batch):
        with jax.default_matmul_precision("float32"):
            return function(nnx.merge(graph, weights), batch)

    return run, weights
