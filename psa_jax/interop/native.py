"""Conversion between adapters in JAX and native files (`adapter_file`).

Trained arrays have the file's tensor names everywhere: in checkpoints, exports and tests.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from psa_jax.interop.adapter_file import (
    Tensors,
    constant_keys,
    fitting_config,
    gate_name,
    read_metadata,
    read_tensors,
    tensor_name,
    write_native,
)
from psa_jax.models.adapter import Adapter, AdapterParam
from psa_jax.models.adapter_config import AdapterConfig, Layers

_PROJECTION = {
    "kernel": "user_proj.proj.weight",
    "bias": "user_proj.proj.bias",
    "norm_scale": "user_proj.norm.weight",
    "norm_bias": "user_proj.norm.bias",
}


def _name(path: tuple[str | int, ...], config: AdapterConfig) -> str:
    """Tensor name in the file of a parameter with this path in the adapter's state."""
    if path[0] == "user_proj":
        return _PROJECTION[path[1]]
    if path[0] == "gate":
        _, half, parameter = path
        layer, _, bias = parameter.partition("_")
        return gate_name(half, 0 if layer == "first" else 2, bias or "weight")
    _, index, projection = path
    return tensor_name(projection, index, before_unet=config.before_unet)


def adapter_arrays(adapter: Adapter) -> dict[str, Float[Array, "..."]]:
    """All trained arrays by tensor name, kernels as [in, out]."""
    return {_name(p, adapter.config): v[...] for p, v in nnx.to_flat_state(nnx.state(adapter, AdapterParam))}


def adapter_shapes(config: AdapterConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of `adapter_arrays` for a configuration, without allocating memory."""
    state = nnx.state(nnx.eval_shape(lambda: Adapter(config, rngs=nnx.Rngs(0))), AdapterParam)
    return {_name(p, config): v.get_value() for p, v in nnx.to_flat_state(state)}


def with_arrays(config: AdapterConfig, arrays: dict[str, Float[Array, "..."]]) -> Adapter:
    """Adapter with the given arrays.

    Args:
      config: sizes.
      arrays: as `adapter_arrays` gives them.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Adapter(config, rngs=nnx.Rngs(0))))
    flat = {p: v.replace(arrays[_name(p, config)]) for p, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def to_file(adapter: Adapter) -> Tensors:
    """Tensors for the native file, in float32, kernels as [out, in].

    A `published` adapter with one token gets zeros for the W_k that the torch original stores (`constant_keys`).
    """
    tensors = {name: np.zeros(shape, np.float32) for name, shape in constant_keys(adapter.config).items()}
    for name, array in adapter_arrays(adapter).items():
        array = np.asarray(array, np.float32)
        tensors[name] = np.ascontiguousarray(array.T if array.ndim == 2 else array)
    return tensors


def save_adapter(adapter: Adapter, path: Path, metadata: dict[str, Any]) -> None:
    """Writes an adapter's native file; arguments and errors as `write_native`."""
    write_native(to_file(adapter), adapter.config, path, metadata)


def load_adapter(path: Path, layers: Layers, cross_dim: int) -> Adapter:
    """Reads a native file.

    Args:
      path: of the file.
      layers: (width, heads) of the base model's cross-attentions, `UNetConfig.cross_attentions`.
      cross_dim: their width of the text states.

    Raises:
      PSAError: damaged, for another base model, or with missing, extra or misshapen tensors.
    """
    about, tensors = read_metadata(path), read_tensors(path)
    config = fitting_config(path, tensors, about, layers, cross_dim)
    arrays = {
        name: jnp.asarray(tensor.T if tensor.ndim == 2 else tensor, jnp.float32)
        for name, tensor in tensors.items()
        if name not in constant_keys(config)
    }
    return with_arrays(config, arrays)
