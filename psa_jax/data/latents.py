"""Pictures to VAE moments: one resize and crop for both pictures of a pair, then the encoder in fixed-size batches."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float16, Float32, PyTree, UInt8
from PIL import Image

from psa_jax.errors import PSAError

_RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,  # antialiased, as in torchvision
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class Prepared(NamedTuple):
    """A picture ready for the VAE, and the two facts about it that SDXL is told.

    Args:
      pixels: [r, r, 3] in [-1, 1].
      original_size: (height, width) of the file, in pixels.
      crop: (top, left) of the crop in the resized picture, in pixels.
    """

    pixels: Float32[np.ndarray, "r r 3"]
    original_size: tuple[int, int]
    crop: tuple[int, int]


@dataclass(frozen=True)
class Preprocess:
    """Resizes the shorter side to `resolution`, then crops the centre.

    Nothing is drawn, so the pictures of a pair, having one size, get one crop.

    Args:
      resolution: side of the result, in pixels.
      resample: bilinear, bicubic or lanczos; all average over the source pixels when they shrink.

    Raises:
      PSAError: a resolution below 1 or another resampling.
    """

    resolution: int
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise PSAError(f"resolution is {self.resolution}; give a number of pixels from 1 up")
        if self.resample not in _RESAMPLE:
            raise PSAError(f"resampling {self.resample!r} does not exist; use one of: {', '.join(_RESAMPLE)}")

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Prepared:
        """Prepares one picture."""
        height, width = image.shape[:2]
        short, side = min(height, width), self.resolution
        # Integer division, as torchvision's Resize: the longer side is rounded down.
        new_height, new_width = side * height // short, side * width // short
        resized = Image.fromarray(image).resize((new_width, new_height), _RESAMPLE[self.resample])
        top, left = (new_height - side) // 2, (new_width - side) // 2
        pixels = np.asarray(resized)[top : top + side, left : left + side]
        scaled = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
        return Prepared(scaled, (height, width), (top, left))


def encode_images(
    encode: Callable[[Float32[np.ndarray, "b h w 3"]], Float32[Array | np.ndarray, "b h2 w2 c2"]],
    images: Iterable[np.ndarray],
    batch_size: int,
) -> Iterator[Float16[np.ndarray, "h2 w2 c2"]]:
    """Moments (mean and log-variance, concatenated on the last axis) of each picture, in order; see `in_batches`.

    Args:
      encode: pictures [b, h, w, 3] in [-1, 1] → moments [b, h/f, w/f, 2c].
      images: [h, w, 3] each, of one size; drawn on demand.
      batch_size: pictures a call.

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
    """An array in float16.

    Raises:
      PSAError: a number that is not finite there; the message begins with `what`.
    """
    with np.errstate(over="ignore"):  # an overflow is infinite, and refused below
        stored = array.astype(np.float16)
    if not np.isfinite(stored).all():
        raise PSAError(f"{what} are not finite in float16; check the model, which is to give numbers below 65504")
    return stored


def in_batches(
    function: Callable[[np.ndarray], PyTree], items: Iterable[np.ndarray], batch_size: int
) -> Iterator[PyTree]:
    """`function` on stacked items; its results item by item, in order.

    Every call gets exactly `batch_size` items, so that jit compiles once: the last batch is filled up with copies of
    its last item, and their results are dropped. A call is started before the results of the one before it are
    fetched: an accelerator does not wait for the host.

    Args:
      function: [b, …] → a tree of arrays [b, …].
      items: of one shape; drawn on demand.
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
    """`function(models, batch)` compiled, its batch split over devices, in full float32.

    Left to itself, a TPU multiplies float32 as bfloat16: the moments are made once and used for ever.

    Args:
      models: NNX modules.
      devices: None takes those of this process.

    Raises:
      PSAError: `batch_size` cannot be divided among the devices.
    """
    devices = jax.local_devices() if devices is None else devices
    if batch_size % len(devices):
        raise PSAError(f"batch size {batch_size} cannot be divided among {len(devices)} devices; use a multiple")
    # Auto axes, as in training: convolutions refuse Explicit ones.
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    graph, weights = nnx.split(models)
    weights = jax.device_put(weights, whole)

    @jax.jit
    def run(weights, batch):
        with jax.default_matmul_precision("float32"):
            return function(nnx.merge(graph, weights), batch)

    return lambda batch: run(weights, jax.device_put(batch, rows))


def fingerprint(vae: Mapping[str, Any], preprocess: Preprocess) -> str:
    """What the moments depend on, as 64 hex digits: the VAE's weights, the resolution and the preprocessing.

    Names, types, shapes and values count; the order of the tensors and the metadata of their file do not.

    Args:
      vae: what np.asarray takes, by name: arrays, or `StableDiffusion.vae_tensors`, read one at a time.
    """
    digest = hashlib.sha256(json.dumps(asdict(preprocess), sort_keys=True).encode())
    for name in sorted(vae):
        array = np.asarray(vae[name])
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
