"""A Stable Diffusion folder in diffusers' layout: read strictly, written back so that diffusers opens it.

Every tensor of a file is used exactly once and has exactly the expected shape; otherwise the load fails and says which.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from psa_jax.errors import PSAError
from psa_jax.models.clip import CLIPText
from psa_jax.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE

TINY = Path(__file__).parents[1] / "assets" / "tiny"
"""The embedded base model; `load_stable_diffusion("tiny")` reads it."""

# Attributes here that are list entries in the torch modules.
_RENAMED = {"to_out_0": "to_out.0", "net_0": "net.0", "net_2": "net.2"}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Attention names of VAEs saved before diffusers 0.15.
_OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def torch_name(path: tuple[str | int, ...]) -> str:
    """Name of a parameter in torch, from its path in the NNX state."""
    *modules, leaf = (str(p) for p in path)
    return ".".join([*(_RENAMED.get(m, m) for m in modules), _LEAVES[leaf]])


def from_torch(weight: np.ndarray, path: tuple[str | int, ...]) -> np.ndarray:
    """Linear [out, in] → [in, out]; convolution [out, in, h, w] → [h, w, in, out]; the rest as is."""
    if path[-1] != "kernel":
        return weight
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def to_torch(weight: np.ndarray, path: tuple[str | int, ...]) -> np.ndarray:
    """The inverse of `from_torch`."""
    if path[-1] != "kernel":
        return weight
    return np.ascontiguousarray(weight.T if weight.ndim == 2 else weight.transpose(3, 2, 0, 1))


def torch_shape(shape: tuple[int, ...], path: tuple[str | int, ...]) -> tuple[int, ...]:
    """Shape in torch of a parameter that has `shape` here."""
    if path[-1] != "kernel":
        return shape
    *window, width_in, width_out = shape
    return (width_out, width_in, *window)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear line."""
    if not path.is_file():
        raise PSAError(f"{path}: file not found; is this a diffusers folder?")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PSAError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise PSAError(f"{path}: expected a JSON object")
    return value


def load_weights(model: nnx.Module, path: Path, rename: Callable[[str], str] = str) -> nnx.Module:
    """Fills an abstract model (`nnx.eval_shape`) from one safetensors file.

    Args:
      rename: maps a tensor name in the file to the name expected here.

    Raises:
      PSAError: missing, extra or misshapen tensors, or an unreadable file.
    """
    if not path.is_file():
        raise PSAError(
            f"{path}: weights not found; psa_jax reads safetensors (convert .bin files with diffusers first)"
        )
    graph, state = nnx.split(model)
    expected = {torch_name(p): p for p, _ in nnx.to_flat_state(state)}
    loaded = {}
    try:
        with safe_open(path, framework="numpy") as file:
            names: dict[str, str] = {}
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                if (other := names.setdefault(rename(name), name)) != name:
                    raise PSAError(f"{path}: {other} and {name} are the same parameter; delete one of them")
            names.pop("text_model.embeddings.position_ids", None)  # a buffer in old CLIP files
            names.pop("embeddings.position_ids", None)
            _require(not (gone := sorted(expected.keys() - names.keys())), path, "missing tensors", gone)
            _require(not (extra := sorted(names.keys() - expected.keys())), path, "unexpected tensors", extra)
            for name, variable in nnx.to_flat_state(state):
                weight, shape = file.get_tensor(names[torch_name(name)]), torch_shape(variable.shape, name)
                if weight.shape != shape:
                    raise PSAError(f"{path}: {torch_name(name)} has shape {weight.shape}, config.json asks for {shape}")
                loaded[name] = variable.replace(jnp.asarray(from_torch(weight, name), dtype=jnp.float32))
    except SafetensorError as error:
        raise PSAError(f"{path}: not a whole safetensors file ({error}); download it again") from error
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _require(condition: bool, path: Path, what: str, names: list[str]) -> None:
    if not condition:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise PSAError(f"{path}: {what}: {shown}; the file does not belong to its config.json")


def save_weights(model: nnx.Module, path: Path, prefix: str = "", dtype: Any = np.float32) -> None:
    """Writes the parameters under their torch names."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    tensors = {prefix + torch_name(p): to_torch(np.asarray(v[...], dtype=dtype), p) for p, v in flat}
    save_file(tensors, path, metadata={"format": "pt"})


class _OneKey(nnx.Rngs):
    """Gives one key again and again. Counting keys while tracing takes time quadratic in the number of parameters."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract_model(model_type: Callable[..., nnx.Module], config: Any) -> nnx.Module:
    """A model with shapes in place of arrays, for `load_weights` and `parameter_count`."""
    return nnx.eval_shape(lambda: model_type(config, rngs=_OneKey(0)))


def _component(folder: Path, name: str, config_type: type, model_type: type, weights: str, rename=str):
    config = config_type.from_json(read_json(folder / name / "config.json"), str(folder / name / "config.json"))
    return load_weights(abstract_model(model_type, config), folder / name / weights, rename)


def load_unet(folder: Path) -> UNet:
    """The UNet of a diffusers folder."""
    return _component(folder, "unet", UNetConfig, UNet, "diffusion_pytorch_model.safetensors")


def load_vae(folder: Path) -> VAE:
    """The VAE of a diffusers folder."""

    def rename(name: str) -> str:
        parts = name.split(".")
        if "attentions" in parts and parts[-2] in _OLD_VAE:
            parts[-2] = _OLD_VAE[parts[-2]]
        return ".".join(parts)

    return _component(folder, "vae", VAEConfig, VAE, "diffusion_pytorch_model.safetensors", rename)


def load_text_encoder(folder: Path) -> CLIPText:
    """The CLIP text encoder of a diffusers folder."""
    return _component(
        folder, "text_encoder", CLIPTextConfig, CLIPText, "model.safetensors", lambda n: n.removeprefix("text_model.")
    )


def load_tokenizer(folder: Path):
    """The CLIP tokenizer of a diffusers folder (no network is used)."""
    from transformers import CLIPTokenizer  # imported late: slow to import

    path = folder / "tokenizer"
    if not (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file():
        raise PSAError(f"{path}: tokenizer files not found (vocab.json and merges.txt)")
    if not (path / "tokenizer.json").is_file() and not (path / "merges.txt").is_file():
        raise PSAError(f"{path / 'merges.txt'}: file not found; a tokenizer needs it beside vocab.json")
    try:
        return CLIPTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = " ".join(str(error).split())
        raise PSAError(f"{path}: not a CLIP tokenizer ({reason}); download it again") from error


@dataclasses.dataclass
class StableDiffusion:
    """The parts of a pipeline folder. Models hold float32 parameters."""

    folder: Path
    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Any
    scheduler_config: dict[str, Any]

    def tokenize(self, prompts: list[str]) -> np.ndarray:
        """Token ids [n, model_max_length] int32, padded and truncated as diffusers does."""
        length = self.text_encoder.config.max_position_embeddings
        ids = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True)["input_ids"]
        return np.asarray(ids, dtype=np.int32)


def load_stable_diffusion(folder: str | Path) -> StableDiffusion:
    """Reads `model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`.

    Raises:
      PSAError: anything missing, of another kind, or not matching its config.
    """
    folder = TINY if str(folder) == "tiny" else Path(folder)
    if not folder.is_dir():
        way_out = "make it with psa-jax pretrain" if folder == TINY else "give a folder in diffusers' layout"
        raise PSAError(f"{folder}: no such model folder; {way_out}")
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise PSAError(f"{folder}: pipeline class {index.get('_class_name')!r} is not StableDiffusionPipeline")
    model = StableDiffusion(  # small parts first: a folder that lacks one is refused before the UNet is read
        folder=folder,
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        tokenizer=load_tokenizer(folder),
        text_encoder=load_text_encoder(folder),
        vae=load_vae(folder),
        unet=load_unet(folder),
    )
    _check_parts_fit(model)
    return model


def _check_parts_fit(model: StableDiffusion) -> None:
    """Parts of different pipelines would fail far from here, or not at all: token ids too high are clamped on a TPU."""
    unet, vae, text = model.unet.config, model.vae.config, model.text_encoder.config
    for what, left, right in (
        ("unet cross_attention_dim and text_encoder hidden_size", unet.cross_attention_dim, text.hidden_size),
        ("unet out_channels and vae latent_channels", unet.out_channels, vae.latent_channels),
    ):
        if left != right:
            raise PSAError(f"{model.folder}: {what} differ ({left} and {right}); the parts are of different models")
    if len(model.tokenizer) > text.vocab_size:
        raise PSAError(
            f"{model.folder}: tokenizer has {len(model.tokenizer)} tokens, text_encoder vocab_size is {text.vocab_size}"
        )


def weights_hash(folder: Path) -> str:
    """sha256 over the weight files of a folder that an adapter depends on: UNet and text encoder."""
    digest = hashlib.sha256()
    for name in ("unet", "text_encoder"):
        for path in sorted((folder / name).glob("*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


_DOWN_VAE, _UP_VAE = "DownEncoderBlock2D", "UpDecoderBlock2D"


def save_stable_diffusion(model: StableDiffusion, out: Path, dtype: Any = np.float32) -> None:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` opens.

    JSON files are copied from `model.folder` where it has them, so that keys unknown here survive a round trip.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise PSAError(f"{out}: not an empty folder; give a new one")
    unfinished = out.with_name(out.name + ".unfinished")
    try:
        _write_parts(model, unfinished, dtype)
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_parts(model: StableDiffusion, out: Path, dtype: Any) -> None:
    parts = {
        "unet": ("UNet2DConditionModel", model.unet, "diffusion_pytorch_model.safetensors", ""),
        "vae": ("AutoencoderKL", model.vae, "diffusion_pytorch_model.safetensors", ""),
        "text_encoder": ("CLIPTextModel", model.text_encoder, "model.safetensors", "text_model."),
    }
    for name, (cls, module, file, prefix) in parts.items():
        (out / name).mkdir(parents=True)
        save_weights(module, out / name / file, prefix, dtype)
        source = model.folder / name / "config.json"
        if source.is_file() and type(module.config).from_json(read_json(source), str(source)) == module.config:
            shutil.copyfile(source, out / name / "config.json")
        else:
            _write_json(out / name / "config.json", config_json(cls, module.config))
    _write_json(out / "scheduler" / "scheduler_config.json", model.scheduler_config)
    model.tokenizer.save_pretrained(out / "tokenizer")
    source = model.folder / "model_index.json"
    index = read_json(source) if source.is_file() else {}
    if scheduler := model.scheduler_config.get("_class_name"):
        index["scheduler"] = ["diffusers", scheduler]
    # A safety checker of the source is not written, so it must not be listed.
    _write_json(out / "model_index.json", _MODEL_INDEX | index | _NOT_WRITTEN)


def config_json(class_name: str, config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict[str, Any]:
    """A `config.json` for a model made here."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    if isinstance(config, CLIPTextConfig):
        return {"architectures": [class_name], "model_type": "clip_text_model", **values}
    if isinstance(config, VAEConfig):
        blocks = len(config.block_out_channels)
        values |= {"down_block_types": [_DOWN_VAE] * blocks, "up_block_types": [_UP_VAE] * blocks}
    return {"_class_name": class_name, **values}


_NOT_WRITTEN = {
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
}
_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parameter_count(model: nnx.Module) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
