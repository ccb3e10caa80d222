"""Weight files: tensor names, layouts and stacks; strict reading, one tensor at a time; writing.

Every tensor of a file is used exactly once and has exactly the expected shape. Otherwise loading fails with its name.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from psa_jax.errors import PSAError
from psa_jax.json_input import read_json
from psa_jax.tensor_file import Entry, all_finite, read_header, require_floats, save_tensors

# Attributes that are list entries in the torch modules.
_RENAMED = {"to_out_0": "to_out.0", "net_0": "net.0", "net_2": "net.2"}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_LEAVES |= {"mean": "running_mean", "var": "running_var"}  # of a batch normalisation
_STACK = "transformer_blocks"
# Tensors that diffusers and transformers ignore unless they are parameters of the model: constants of old files
# (positions and frequencies), and the other parts of a whole CLIP.
UNUSED = re.compile(
    r"(text_model\.)?embeddings\.position_ids|.*\.rotary_emb\.inv_freq"
    r"|logit_scale|text_projection\.weight|visual_projection\.weight|vision_model\..*"
)
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

ParameterPath = tuple[str | int, ...]
Index = tuple[slice, ...]
Shardings = Callable[[ParameterPath, tuple[int, ...]], jax.sharding.Sharding]


def torch_name(path: ParameterPath) -> str:
    """Torch's name of the parameter with this path in the NNX state."""
    *modules, leaf = (str(p) for p in path)
    return ".".join([*(_RENAMED.get(m, m) for m in modules), _LEAVES.get(leaf, leaf)])


def torch_names(path: ParameterPath, shape: tuple[int, ...]) -> list[str]:
    """Torch's names of the tensors in a parameter: one, or one for each block if its first axis stacks blocks.

    Args:
      path: of the parameter in the NNX state.
      shape: of the parameter.
    """
    if not is_stacked(path):
        return [torch_name(path)]
    at = path.index(_STACK) + 1
    return [torch_name((*path[:at], block, *path[at:])) for block in range(shape[0])]


def is_stacked(path: ParameterPath) -> bool:
    """Whether a parameter's first axis runs over the transformer blocks of a stack."""
    return _STACK in path and not str(path[path.index(_STACK) + 1]).isdigit()


def from_torch(weight: np.ndarray, path: ParameterPath) -> np.ndarray:
    """View of torch's tensor in this project's layout.

    Linear kernels go from [out, in] to [in, out], convolutions from [out, in, h, w] to [h, w, in, out]; other tensors
    are unchanged.
    """
    if path[-1] != "kernel":
        return weight
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def to_torch(weight: np.ndarray, path: ParameterPath) -> np.ndarray:
    """Contiguous tensor in torch's layout: the inverse of `from_torch`."""
    if path[-1] != "kernel":
        return weight
    return np.ascontiguousarray(weight.T if weight.ndim == 2 else weight.transpose(3, 2, 0, 1))


def torch_order(axes: tuple[Any, ...], path: ParameterPath) -> tuple[Any, ...]:
    """Items for each axis of a parameter (its shape, an index) in the order of torch's axes."""
    if path[-1] != "kernel":
        return axes
    *window, width_in, width_out = axes
    return (width_out, width_in, *window)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Lazily read tensor of a file.

    Attributes:
      shape: in torch's layout.
      read: index -> this part of the tensor, in the file's dtype.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]

    def all(self) -> np.ndarray:
        """The whole tensor, in the file's dtype."""
        return self.read((slice(None),) * len(self.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # every read makes a copy
        return self.all() if dtype is None else self.all().astype(dtype)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """Tensors of one model.

    Attributes:
      where: the file, for errors.
      by_name: name -> tensor.
    """

    where: Path
    by_name: Mapping[str, Tensor]

    def renamed(self, rename: Callable[[str], str]) -> "Tensors":
        """The same tensors under new names.

        Args:
          rename: old name -> new name.

        Raises:
          PSAError: two tensors get the same name.
        """
        first: dict[str, str] = {}
        for name in self.by_name:
            if (other := first.setdefault(rename(name), name)) != name:
                raise PSAError(f"{self.where}: {other} and {name} are the same parameter; delete one of them")
        return Tensors(self.where, {new: self.by_name[old] for new, old in first.items()})


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a folder has weights of a variant in any format, such as `*.fp16.*` or its shards."""
    return any(f".{variant}." in path.name or f".{variant}-" in path.name for path in folder.glob("*"))


def _variants(folder: Path, stem: str) -> list[str]:
    patterns = (rf"{stem}\.(\w+)\.safetensors", rf"{stem}\.safetensors\.index\.(\w+)\.json")
    patterns += (rf"{stem}\.safetensors\.(\w+)\.index\.json",)
    matches = (re.fullmatch(pattern, path.name) for path in folder.glob("*") for pattern in patterns)
    return sorted({match[1] for match in matches if match})


def find_weights(folder: Path, stem: str, variant: str | None = None, *, advice: str = "give --variant={}") -> Path:
    """Path of a model's weights: `{stem}.safetensors`, or the index of its shards.

    Args:
      folder: of the model.
      stem: name of the weight files up to the variant.
      variant: such as "fp16"; None for files without one.
      advice: end of the error if only other variants are there; {} stands for the first of them.

    Raises:
      PSAError: no such file, or more than one; the message says what to do.
    """
    single = f"{stem}.safetensors"
    candidates = [single, f"{single}.index.json"]
    if variant is not None:  # the last name is diffusers' older one
        candidates = [f"{stem}.{variant}.safetensors", f"{single}.index.{variant}.json"]
        candidates.append(f"{single}.{variant}.index.json")
    found = [folder / name for name in candidates if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise PSAError(f"{found[0]}: {found[1].name} is there too; delete one of them")
    wanted = folder / candidates[0]
    if variants := _variants(folder, stem):
        raise PSAError(
            f"{wanted}: weights not found, but those of the variant {' or '.join(variants)} are there; "
            f"{advice.format(variants[0])}"
        )
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if pickles:
        raise PSAError(f"{wanted}: weights not found; {_refuse_pickle(pickles[0])}")
    raise PSAError(f"{wanted}: weights not found; download the folder again, with its safetensors files")


def _refuse_pickle(name: str) -> str:
    return (
        f"{name} is a pickle, which can run code, and is not read: convert .bin and .ckpt files to safetensors first "
        "(load them in diffusers and call save_pretrained)"
    )


def open_tensors(path: Path) -> Tensors:
    """Opens a safetensors file, or the index (`*.json`) of a sharded one, without reading tensors.

    Raises:
      PSAError: a missing or damaged file, or shards that do not match the index.
    """
    if path.suffix in _PICKLES:
        raise PSAError(f"{path}: {_refuse_pickle(path.name)}")
    if not path.is_file():
        raise PSAError(f"{path}: weights not found; psa_jax reads safetensors files")
    return Tensors(path, _open_index(path) if path.suffix == ".json" else _open_file(path))


def _open_file(path: Path) -> dict[str, Tensor]:
    return {name: _tensor(path, name, entry) for name, entry in read_header(path).tensors.items()}


def _tensor(path: Path, name: str, entry: Entry) -> Tensor:
    def read(index: Index) -> np.ndarray:
        require_floats(path, name, entry.dtype)
        dtype = np.dtype(_DTYPES[entry.dtype])
        if not math.prod(entry.shape):
            return np.empty(entry.shape, dtype)[index]
        # Mapped for each read: the pages of a file that stays mapped would count as memory.
        size = math.prod(entry.shape) * dtype.itemsize
        whole = np.memmap(path, np.uint8, "r", entry.start, size).view(np.ndarray)
        return np.asarray(whole.view(dtype).reshape(entry.shape)[index])

    return Tensor(entry.shape, read)


def shards_of(path: Path) -> list[str]:
    """Sorted names of the files that an index lists. They lie in its folder.

    Raises:
      PSAError: a malformed index, or a missing file.
    """
    return sorted(set(_read_index(path).values()))


def _read_index(path: Path) -> dict[str, str]:
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise PSAError(f"{path}: no weight_map from tensor names to files; download it again")
    files = {name: file.removeprefix("./") for name, file in files.items()}
    for shard in sorted(set(files.values())):
        if os.path.basename(shard) != shard or not shard.endswith(".safetensors"):
            raise PSAError(f"{path}: {shard!r} is not the name of a safetensors file beside it")
        if not (path.parent / shard).is_file():
            raise PSAError(f"{path.parent / shard}: not found, but {path.name} lists it; download it again")
    return files


def _open_index(path: Path) -> dict[str, Tensor]:
    files, found = _read_index(path), dict[str, Tensor]()
    # All tensors of each file are read, whatever the index says of them, as in diffusers and transformers.
    for shard in sorted(set(files.values())):
        tensors = _open_file(path.parent / shard)
        if twice := tensors.keys() & found.keys():
            raise PSAError(f"{path.parent / shard}: {shown(twice)} is in another file, too; download the files again")
        found |= tensors
    if missing := files.keys() - found.keys():
        raise PSAError(f"{path}: missing tensors: {shown(missing)}; download it and the files that it lists again")
    return found


def shown(names: set[str]) -> str:
    """The first three names, and the number of others, for an error."""
    first = [name if name.isprintable() else repr(name) for name in sorted(names)[:3]]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def parameter_names(model: nnx.Module) -> set[str]:
    """Torch's names of all tensors of a model."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {name for path, variable in flat for name in torch_names(path, variable.shape)}


def load_weights(
    model: nnx.Module,
    source: Path | Tensors,
    rename: Callable[[str], str] = str,
    *,
    dtype: Any = jnp.float32,
    sharding: Shardings | None = None,
    sizes: str = "its config.json",
) -> nnx.Module:
    """Loads weights into an abstract model, one tensor at a time.

    Args:
      model: of `abstract_model`.
      source: a safetensors file, the index of a sharded one, or opened tensors.
      rename: tensor name in the file -> torch's name of the parameter.
      dtype: of every parameter, independent of the file's type.
      sharding: (path, shape) of a parameter -> its sharding; a process then reads only its own parts.
      sizes: what says the model's sizes, for errors.

    Returns:
      The model with its weights.

    Raises:
      PSAError: missing, extra or misshapen tensors, values that are not finite in `dtype`, or an unreadable file.
    """
    tensors = (open_tensors(source) if isinstance(source, Path) else source).renamed(rename)
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    expected = parameter_names(model)
    where = tensors.where
    by_name = {name: t for name, t in tensors.by_name.items() if name in expected or not UNUSED.fullmatch(name)}
    for what, names in (("missing", expected - by_name.keys()), ("unexpected", by_name.keys() - expected)):
        if names:
            raise PSAError(f"{where}: {what} tensors: {shown(names)}; the file does not belong to {sizes}")
    for path, variable in flat:
        shape = torch_order(variable.shape[1:] if is_stacked(path) else variable.shape, path)
        for name in torch_names(path, variable.shape):
            if by_name[name].shape != shape:
                raise PSAError(f"{where}: {name} has shape {by_name[name].shape}, {sizes} asks for {shape}")
    return nnx.merge(graph, nnx.from_flat_state(_filled(flat, Tensors(where, by_name), np.dtype(dtype), sharding)))


def _filled(flat, tensors: Tensors, dtype: np.dtype, sharding) -> Iterator[tuple[ParameterPath, Any]]:
    for path, variable in flat:

        def read(index: Index, path=path, shape=variable.shape) -> np.ndarray:
            return _read(tensors, path, shape, index, dtype)

        if sharding is None:
            array = jax.device_put(read((slice(None),) * variable.ndim))  # jnp.asarray would compile for each shape
        else:
            array = jax.make_array_from_callback(variable.shape, sharding(path, variable.shape), read)
        yield path, variable.replace(array)


def _read(tensors: Tensors, path: ParameterPath, shape: tuple[int, ...], index: Index, dtype: np.dtype) -> np.ndarray:
    """Part of a parameter in this project's layout: transposed, stacked and cast in one pass over the bytes.

    Raises:
      PSAError: a value is not finite in `dtype`.
    """
    names = torch_names(path, shape)
    part = np.empty([len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)], dtype)
    if is_stacked(path):
        names, index, blocks = names[index[0]], index[1:], part
    else:
        blocks = [part]
    for name, block in zip(names, blocks, strict=True):
        raw = tensors.by_name[name].read(torch_order(index, path))
        with np.errstate(over="ignore"):  # infinite, and refused
            block[...] = from_torch(raw, path)
        if not all_finite(block):
            damaged = not np.isfinite(raw).all()
            way_out = "the file is damaged, download it again" if damaged else "take a type with a larger range"
            raise PSAError(f"{tensors.where}: {name} has values that are not finite in {dtype.name}; {way_out}")
    return part


def save_weights(
    model: nnx.Module, path: Path, rename: Callable[[str], str] = str, *, dtype: Any | None = None
) -> None:
    """Writes a model's parameters to a safetensors file.

    Args:
      model: with weights.
      path: of the file.
      rename: torch's name of a parameter -> tensor name in the file.
      dtype: of the tensors; None for the parameters' own.

    Raises:
      PSAError: a value is not finite in `dtype`; nothing is written.
    """
    tensors = {}
    for where, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        with np.errstate(over="ignore"):  # infinite, and refused
            array = np.asarray(variable[...], dtype=dtype)
        if not all_finite(array):
            raise PSAError(
                f"{path}: not written: {torch_name(where)} has values that are not finite in {array.dtype.name}; "
                "write a type with a larger range, or a baked model at a smaller --scale"
            )
        names = torch_names(where, array.shape)
        for name, block in zip(names, array if is_stacked(where) else [array], strict=True):
            tensors[rename(name)] = to_torch(block, where)
    save_tensors(tensors, path, {"format": "pt"})


class _OneKey(nnx.Rngs):
    """Random stream that repeats one key: counting keys while tracing takes time quadratic in the parameters."""

    def __init__(self, params: Any = None):
        super().__init__()

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(model_type: Callable[..., nnx.Module], config: Any) -> nnx.Module:
    """Model with shapes in place of arrays, for `load_weights` and `parameter_count`.

    Args:
      model_type: class of the model.
      config: its configuration.
    """
    return nnx.merge(*_abstract_parts(model_type, config), copy=True)


@functools.lru_cache(maxsize=32)
def _abstract_parts(model_type: Callable[..., nnx.Module], config: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """Tracing a constructor takes half of the time in which a small model is loaded."""
    return nnx.split(nnx.eval_shape(lambda: model_type(config, rngs=_OneKey())))


def parameter_count(model: nnx.Module) -> int:
    """Number of a model's parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
