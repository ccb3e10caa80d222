"""Tensor files: names, layouts, stacks, strict reading one tensor at a time, writing.

Every tensor of a file is used exactly once and has exactly the expected shape; otherwise the load fails and says which.
"""

import dataclasses
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

# Attributes here that are list entries in the torch modules.
_RENAMED = {"to_out_0": "to_out.0", "net_0": "net.0", "net_2": "net.2"}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_STACK = "transformer_blocks"
# What diffusers and transformers do not read where it is not a parameter of the model: constants of old files (0, 1, 2,
# …, and frequencies), and the rest of a whole CLIP.
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
    """Name of a parameter in torch, from its path in the NNX state."""
    *modules, leaf = (str(p) for p in path)
    return ".".join([*(_RENAMED.get(m, m) for m in modules), _LEAVES[leaf]])


def torch_names(path: ParameterPath, shape: tuple[int, ...]) -> list[str]:
    """Names in torch of the tensors in a parameter: one, or one a block where its first axis stacks blocks."""
    if not is_stacked(path):
        return [torch_name(path)]
    at = path.index(_STACK) + 1
    return [torch_name((*path[:at], block, *path[at:])) for block in range(shape[0])]


def is_stacked(path: ParameterPath) -> bool:
    """Whether the first axis of a parameter runs over the transformer blocks of a stack."""
    return _STACK in path and not str(path[path.index(_STACK) + 1]).isdigit()


def from_torch(weight: np.ndarray, path: ParameterPath) -> np.ndarray:
    """Linear [out, in] → [in, out]; convolution [out, in, h, w] → [h, w, in, out]; the rest as is. A view."""
    if path[-1] != "kernel":
        return weight
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def to_torch(weight: np.ndarray, path: ParameterPath) -> np.ndarray:
    """The inverse of `from_torch`."""
    if path[-1] != "kernel":
        return weight
    return np.ascontiguousarray(weight.T if weight.ndim == 2 else weight.transpose(3, 2, 0, 1))


def torch_order(axes: tuple[Any, ...], path: ParameterPath) -> tuple[Any, ...]:
    """What belongs to the axes of a parameter (its shape, an index) in the order of torch's axes."""
    if path[-1] != "kernel":
        return axes
    *window, width_in, width_out = axes
    return (width_out, width_in, *window)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is asked for.

    Attributes:
      shape: its shape in torch.
      read: index -> that part of it, in the dtype of the file.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]

    def all(self) -> np.ndarray:
        """The whole tensor."""
        return self.read((slice(None),) * len(self.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # every reading is one
        return self.all() if dtype is None else self.all().astype(dtype)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of one model by their names; `where` is the file that an error names."""

    where: Path
    by_name: Mapping[str, Tensor]

    def renamed(self, rename: Callable[[str], str]) -> "Tensors":
        """The same tensors under other names.

        Raises:
          PSAError: two would get the same name.
        """
        first: dict[str, str] = {}
        for name in self.by_name:
            if (other := first.setdefault(rename(name), name)) != name:
                raise PSAError(f"{self.where}: {other} and {name} are the same parameter; delete one of them")
        return Tensors(self.where, {new: self.by_name[old] for new, old in first.items()})


def has_variant(folder: Path, variant: str) -> bool:
    """Whether the folder of a part has weights of a variant, in whatever format: `*.fp16.*`, or shards of it."""
    return any(f".{variant}." in path.name or f".{variant}-" in path.name for path in folder.glob("*"))


def _variants(folder: Path, stem: str) -> list[str]:
    patterns = (rf"{stem}\.(\w+)\.safetensors", rf"{stem}\.safetensors\.index\.(\w+)\.json")
    patterns += (rf"{stem}\.safetensors\.(\w+)\.index\.json",)
    matches = (re.fullmatch(pattern, path.name) for path in folder.glob("*") for pattern in patterns)
    return sorted({match[1] for match in matches if match})


def find_weights(folder: Path, stem: str, variant: str | None = None, *, advice: str = "give --variant={}") -> Path:
    """The weights of a part: `{stem}.safetensors`, or the index of its shards, of one variant.

    Args:
      advice: where only another variant is there, whose name takes the place of {}.

    Raises:
      PSAError: there is none, or more than one; the line says what is there and the way out.
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
    """Opens a safetensors file, or the index (`*.json`) of a sharded one; no tensor is read yet.

    Raises:
      PSAError: not a whole safetensors file, or shards that are not as the index says.
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
        # Mapped anew for each read: of a file that stays mapped, every page would go on counting as memory.
        size = math.prod(entry.shape) * dtype.itemsize
        whole = np.memmap(path, np.uint8, "r", entry.start, size).view(np.ndarray)
        return np.asarray(whole.view(dtype).reshape(entry.shape)[index])

    return Tensor(entry.shape, read)


def shards_of(path: Path) -> list[str]:
    """Names of the files that an index lists, in order; they lie beside it."""
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
    for shard in sorted(
        set(files.values())
    ):  # as diffusers and transformers do: all of each file, whichever of them the index says
        tensors = _open_file(path.parent / shard)
        if twice := tensors.keys() & found.keys():
            raise PSAError(f"{path.parent / shard}: {shown(twice)} is in another file, too; download the files again")
        found |= tensors
    if missing := files.keys() - found.keys():
        raise PSAError(f"{path}: missing tensors: {shown(missing)}; download it and the files that it lists again")
    return found


def shown(names: set[str]) -> str:
    """The first three names, and how many more."""
    first = [name if name.isprintable() else repr(name) for name in sorted(names)[:3]]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def parameter_names(model: nnx.Module) -> set[str]:
    """Names, in torch's layout, of the tensors that the model is made of."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {name for path, variable in flat for name in torch_names(path, variable.shape)}


def load_weights(
    model: nnx.Module,
    source: Path | Tensors,
    rename: Callable[[str], str] = str,
    *,
    dtype: Any = jnp.float32,
    sharding: Shardings | None = None,
) -> nnx.Module:
    """Fills an abstract model (`abstract_model`), one tensor at a time.

    Args:
      source: a safetensors file, the index of a sharded one, or opened tensors.
      rename: maps a tensor name in the file to the name expected here.
      dtype: of every parameter, whatever the file holds.
      sharding: (path, shape) of a parameter -> where it lives; a process then reads only the parts it holds.

    Raises:
      PSAError: missing, extra or misshapen tensors, numbers that are not finite in `dtype`, or an unreadable file.
    """
    tensors = (open_tensors(source) if isinstance(source, Path) else source).renamed(rename)
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    expected = parameter_names(model)
    where = tensors.where
    by_name = {name: t for name, t in tensors.by_name.items() if name in expected or not UNUSED.fullmatch(name)}
    for what, names in (("missing", expected - by_name.keys()), ("unexpected", by_name.keys() - expected)):
        if names:
            raise PSAError(f"{where}: {what} tensors: {shown(names)}; the file does not belong to its config.json")
    for path, variable in flat:
        shape = torch_order(variable.shape[1:] if is_stacked(path) else variable.shape, path)
        for name in torch_names(path, variable.shape):
            if by_name[name].shape != shape:
                raise PSAError(f"{where}: {name} has shape {by_name[name].shape}, config.json asks for {shape}")
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
    """A part of a parameter, in the layout of this project: turned, stacked and cast in one pass over the bytes.

    Raises:
      PSAError: a number is not finite in `dtype`.
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
    """Writes the parameters under their torch names, in `dtype` or as the model holds them.

    Raises:
      PSAError: a number is not finite in that type; nothing is written.
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
    """Gives one key again and again. Counting keys while tracing takes time quadratic in the number of parameters."""

    def __init__(self, params: Any = None):
        super().__init__()

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(model_type: Callable[..., nnx.Module], config: Any) -> nnx.Module:
    """A model with shapes in place of arrays, for `load_weights` and `parameter_count`."""
    return nnx.eval_shape(lambda: model_type(config, rngs=_OneKey()))


def parameter_count(model: nnx.Module) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
