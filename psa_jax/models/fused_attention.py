"""Self-attention without its weights in memory: cuDNN's kernel on a GPU, splash attention on a TPU, else blocks.

`attend` writes its weights to memory, heads × pixels × pixels of each picture. At 512 px they take most of the
memory of Stable Diffusion 1.5's training step, and half of its time. A kernel keeps them on the chip and recomputes
them in the backward pass. Where there is no kernel (float32, a CPU), they are computed for some queries at a time.

Source: FlashAttention-2, arXiv 2307.08691.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from psa_jax.models.attention import KERNEL, Attend, attend

_LONG = 1024  # pixels from which the weights are worth a kernel or blocks: 32 × 32
_QUERIES = 512  # of a block, where no kernel fits
_AMPERE, _CUDNN_WIDTH = 8.0, 128  # the first GPU that cuDNN's kernel supports, and its widest head on all of them
_LANES = 128  # of a TPU's registers; splash attention's blocks are multiples of it


def fused_attention(devices: Mesh, rows: PartitionSpec) -> Attend:
    """The fastest implementation of `attend` for these devices.

    Kernels take self-attention on 16-bit numbers and 1,024 pixels or more. Other inputs of this length, and
    devices without a kernel, use `attend` on blocks of queries; fewer pixels use `attend` itself.

    Args:
      devices: of one kind.
      rows: partition of a batch's rows over the devices.
    """
    device = devices.devices.flat[0]
    if device.platform == "tpu":
        return functools.partial(_on_tpu, devices, rows)
    return _on_gpu if _has_cudnn(getattr(device, "compute_capability", "")) else _without_kernel


def _has_cudnn(compute_capability: str) -> bool:
    """Whether cuDNN's kernel supports a GPU: an H100 is 9.0, a T4 7.5 (too old). AMD's start with letters."""
    return compute_capability[:1].isdigit() and float(compute_capability) >= _AMPERE


def devices_of(array: Array) -> Mesh:
    """Mesh of the devices that hold an array."""
    where = array.sharding
    return where.mesh if isinstance(where, NamedSharding) else Mesh(np.array(list(where.device_set)), ("devices",))


def _long(query: Array, key: Array) -> bool:
    return min(query.shape[1], key.shape[1]) >= _LONG


def _without_kernel(
    query: Float[Array, "b n d"], key: Float[Array, "b m d"], value: Float[Array, "b m d"], heads: int
) -> Float[Array, "b n d"]:
    """`attend` on one block of queries after the other, in the backward pass too."""
    if not _long(query, key):
        return attend(query, key, value, heads)
    batch, pixels, width = query.shape
    blocks = -(-pixels // _QUERIES)
    rows = -(-pixels // blocks)
    padded = jnp.pad(query, ((0, 0), (0, blocks * rows - pixels), (0, 0)))

    # The backward pass computes a block's weights anew; in a loop nothing merges them with the first ones.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(query):
        return attend(query, key, value, heads)

    out = jax.lax.map(block, padded.reshape(batch, blocks, rows, width).swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(batch, blocks * rows, -1)[:, :pixels]


def _on_gpu(
    query: Float[Array, "b n d"], key: Float[Array, "b m d"], value: Float[Array, "b m d"], heads: int
) -> Float[Array, "b n d"]:
    width = query.shape[-1] // heads
    if query.dtype.itemsize != 2 or not _long(query, key) or width % 8 or width > _CUDNN_WIDTH:
        return _without_kernel(query, key, value, heads)
    split = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    with jax.named_scope("attention"):
        return jax.nn.dot_product_attention(*split, implementation="cudnn").reshape(query.shape)


class _Tiles(NamedTuple):
    """The most queries and keys of a tile of splash attention, forward and backward."""

    queries: int
    keys: int
    queries_back: int
    keys_back: int


# Found with libtpu 0.0.42.1 for 4,096 × 40, 4,096 × 64, 9,216 × 64 and 1,024 × 80 (pixels × head width): the tiles with
# the fewest instructions of those whose scratch fits a kernel's 16 MiB. A tile of all keys needs no sum of partial
# gradients of the queries. tests/benchmarks/NOTES.md has the numbers.
TILES = {
    "TPU v5 lite": _Tiles(512, 4608, 1024, 4096),
    "TPU v5": _Tiles(512, 4608, 512, 2304),
    "TPU v6 lite": _Tiles(512, 4608, 1024, 4608),
}
"""Kind of a device → its tiles."""
_OTHER_TILES = _Tiles(512, 1024, 512, 1024)  # what fits the older chips
_KEYS_AT_ONCE = 512  # of a matrix product in a tile


def _on_tpu(
    devices: Mesh,
    rows: PartitionSpec,
    query: Float[Array, "b n d"],
    key: Float[Array, "b m d"],
    value: Float[Array, "b m d"],
    heads: int,
) -> Float[Array, "b n d"]:
    pixels = query.shape[1]
    if query.dtype.itemsize != 2 or not _long(query, key) or key.shape[1] != pixels:
        return _without_kernel(query, key, value, heads)
    tiles = TILES.get(devices.devices.flat[0].device_kind, _OTHER_TILES)
    padded = _padded(pixels, tiles)

    @jax.named_scope("attention")
    def attention(*inputs):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.FullMask((padded, padded))] * heads),
            block_sizes=_block_sizes(padded, tiles),
            residual_checkpoint_name=KERNEL,
        )
        if padded > pixels:  # keys attend within their segment
            segments = (jnp.arange(padded) >= pixels).astype(jnp.int32)
            kernel = functools.partial(kernel, segment_ids=splash.SegmentIds(segments, segments))
        split = (jnp.pad(x, ((0, 0), (0, padded - pixels), (0, 0))) for x in inputs)
        split = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in split)
        out = jax.vmap(kernel)(*split).swapaxes(1, 2)
        return out.reshape(*out.shape[:2], -1)[:, :pixels]

    # The compiler cannot divide a kernel by itself. Where each device works on its own there is nothing to divide.
    divided = attention
    if not jax.sharding.get_abstract_mesh().manual_axes:
        divided = jax.shard_map(attention, mesh=devices, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
    # The kernel has no scale. In float32, since 40 ** -0.5 in bfloat16 would be off by the same share for all logits.
    scaled = query.astype(jnp.float32) * (query.shape[-1] // heads) ** -0.5
    return divided(scaled.astype(query.dtype), key, value)


def _padded(pixels: int, tiles: _Tiles) -> int:
    """The next number of pixels that large tiles divide, such as 1,152 for itself and 4,096 for 4,032."""
    padded = -(-pixels // _LANES) * _LANES
    while _largest(padded, tiles.queries) < 256 or _largest(padded, tiles.keys) < _KEYS_AT_ONCE:
        padded += _LANES
    return padded


def _largest(pixels: int, most: int) -> int:
    """The largest divisor of the pixels up to `most` that is a multiple of the lanes."""
    return next(size for size in range(min(pixels, most), 0, -_LANES) if pixels % size == 0)


def _block_sizes(pixels: int, tiles: _Tiles) -> splash.BlockSizes:
    keys, keys_back = _largest(pixels, tiles.keys), _largest(pixels, tiles.keys_back)
    return splash.BlockSizes(
        block_q=_largest(pixels, tiles.queries),
        block_kv=keys,
        block_kv_compute=_largest(keys, _KEYS_AT_ONCE),
        block_q_dkv=_largest(pixels, tiles.queries_back),
        block_kv_dkv=keys_back,
        block_kv_dkv_compute=_largest(keys_back, _KEYS_AT_ONCE),
        use_fused_bwd_kernel=True,
        # Pixels along the lanes: heads are then split without a copy, and no lane is left empty.
        q_layout=splash.QKVLayout.SEQ_MINOR,
        k_layout=splash.QKVLayout.SEQ_MINOR,
        v_layout=splash.QKVLayout.SEQ_MINOR,
    )
