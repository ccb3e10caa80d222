"""Self-attention by a fused kernel: cuDNN's on a GPU, Pallas's flash attention on a TPU.

`attend` writes its weights to memory, heads × pixels × pixels of each picture. At 512 px they take most of the
memory of Stable Diffusion 1.5's training step, and half of its time. A kernel keeps them on the chip and recomputes
them in the backward pass.

Source: FlashAttention-2, arXiv 2307.08691.
"""

import functools

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from psa_jax.models.attention import Attend, attend

_LONG = 1024  # pixels from which the weights are worth a kernel: 32 × 32
_BLOCKS = (512, 384, 256, 128)  # rows of a TPU's tile; the first that divides the pixels
_AMPERE, _CUDNN_WIDTH = 8.0, 128  # the first GPU that cuDNN's kernel supports, and its widest head on all of them


def fused_attention(devices: Mesh, rows: PartitionSpec) -> Attend:
    """The fastest implementation of `attend` for these devices.

    Kernels take 16-bit numbers and 1,024 pixels or more. Other inputs, and devices without a kernel, use `attend`.

    Args:
      devices: of one kind.
      rows: partition of a batch's rows over the devices.
    """
    device = devices.devices.flat[0]
    if device.platform == "tpu":
        return functools.partial(_on_tpu, devices, rows)
    return _on_gpu if _has_cudnn(getattr(device, "compute_capability", "")) else attend


def _has_cudnn(compute_capability: str) -> bool:
    """Whether cuDNN's kernel supports a GPU: an H100 is 9.0, a T4 7.5 (too old). AMD's start with letters."""
    return compute_capability[:1].isdigit() and float(compute_capability) >= _AMPERE


def devices_of(array: Array) -> Mesh:
    """Mesh of the devices that hold an array."""
    where = array.sharding
    return where.mesh if isinstance(where, NamedSharding) else Mesh(np.array(list(where.device_set)), ("devices",))


def _long(query: Array, key: Array) -> bool:
    return query.dtype.itemsize == 2 and min(query.shape[1], key.shape[1]) >= _LONG


def _on_gpu(
    query: Float[Array, "b n d"], key: Float[Array, "b m d"], value: Float[Array, "b m d"], heads: int
) -> Float[Array, "b n d"]:
    width = query.shape[-1] // heads
    if not _long(query, key) or width % 8 or width > _CUDNN_WIDTH:
        return attend(query, key, value, heads)
    split = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    return jax.nn.dot_product_attention(*split, implementation="cudnn").reshape(query.shape)


def _on_tpu(
    devices: Mesh,
    rows: PartitionSpec,
    query: Float[Array, "b n d"],
    key: Float[Array, "b m d"],
    value: Float[Array, "b m d"],
    heads: int,
) -> Float[Array, "b n d"]:
    tiles = [next((block for block in _BLOCKS if x.shape[1] % block == 0), None) for x in (query, key)]
    if not _long(query, key) or None in tiles:
        return attend(query, key, value, heads)

    def kernel(*inputs):
        split = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in inputs)
        out = flash_attention(*split, sm_scale=(query.shape[-1] // heads) ** -0.5, block_sizes=_tiles(*tiles))
        return out.swapaxes(1, 2).reshape(inputs[0].shape)

    # The compiler cannot divide a kernel by itself.
    divided = jax.shard_map(kernel, mesh=devices, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
    return divided(query, key, value)


def _tiles(q: int, k: int) -> BlockSizes:
    forward = dict(block_q=q, block_k_major=k, block_k=k, block_b=1)
    of_keys = dict(block_q_major_dkv=q, block_k_major_dkv=k, block_k_dkv=k, block_q_dkv=q)
    return BlockSizes(**forward, **of_keys, block_k_major_dq=k, block_k_dq=k, block_q_dq=q)
