"""Adapters in JAX to and from the native file (`adapter_file`), whose names the trained arrays have everywhere."""

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
    """Name in the file of a parameter, from its path in the adapter's state."""
    if path[0] == "user_proj":
        return _PROJECTION[path[1]]
    _, index, projection = path
    return tensor_name(projection, index, before_unet=config.before_unet)


def adapter_arrays(adapter: Adapter) -> dict[str, Float[Array, "..."]]:
    """Every trained array under its name in the file, in this project's orientation [in, out]."""
    return {_name(p, adapter.config): v[...] for p, v in nnx.to_flat_state(nnx.state(adapter, AdapterParam))}


def adapter_shapes(config: AdapterConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `adapter_arrays`; nothing is allocated."""
    state = nnx.state(nnx.eval_shape(lambda: Adapter(config, rngs=nnx.Rngs(0))), AdapterParam)
    return {_name(p, config): v.get_value() for p, v in nnx.to_flat_state(state)}


def with_arrays(config: AdapterConfig, arrays: dict[str, Float[Array, "..."]]) -> Adapter:
    """The adapter that holds the given arrays (names and orientation as `adapter_arrays`)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Adapter(config, rngs=nnx.Rngs(0))))
    flat = {p: v.replace(arrays[_name(p, config)]) for p, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def to_file(adapter: Adapter) -> Tensors:
    """Tensors as the file holds them: [out, in], float32, and W_k as zeros where one token needs none."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in constant_keys(adapter.config).items()}
    for name, array in adapter_arrays(adapter).items():
        array = np.asarray(array, np.float32)
        tensors[name] = np.ascontiguousarray(array.T if array.ndim == 2 else array)
    return tensors


def save_adapter(adapter: Adapter, path: Path, metadata: dict[str, Any]) -> None:
    """Writes an adapter's native file (`write_native`)."""
    write_native(to_file(adapter), adapter.config, path, metadata)


def load_adapter(path: Path, layers: Layers, cross_dim: int) -> Adapter:
    """Reads a native file for a base model with the given cross-attentions (`UNetConfig.cross_attentions`) and width.

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
