"""Names in LoRA files: from a tensor's name to the layer of the base model and the part of its update.

Names in diffusers' files have dots (`unet.down_blocks.0….to_q.lora_A.weight`, or older spellings). Names in kohya's
files have underscores (`lora_unet_down_blocks_0_…_to_q`), with blocks numbered as in diffusers or as in the original
code (`lora_unet_input_blocks_1_1_…`). Underscores are ambiguous, so the model's own layer names are the dictionary.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from psa_jax.errors import PSAError
from psa_jax.interop.lora_settings import MERGE_ELSEWHERE
from psa_jax.interop.parts import MODELS
from psa_jax.interop.single_file import ldm_layer
from psa_jax.interop.weights import Tensors

# End of a tensor's name -> its part of the update.
_ENDS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.alpha": "alpha",
    "_lora.alpha": "alpha",
    ".alpha": "alpha",
}
# Patterns of tensors of other methods, whose update is not (alpha / r) · B A -> the method.
_METHODS = (
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.lora_mid\.", "LoCon with a core tensor (CP or Tucker)"),
    (r"\.(dora_scale|lora_magnitude_vector)\b", "DoRA"),
    (r"\.(ia3_l|on_input)\b", "IA3"),
    (r"\.(oft_|boft_)", "OFT"),
    (r"\.vera_", "VeRA"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.(diff|diff_b)$", "full weight differences"),
    (r"\.(w_norm|b_norm)$", "trained normalisation layers"),
    (r"\.scalar$", "LyCORIS with a trained scalar"),
    (r"\.bias_(indices|values|size)$", "LoRA with biases"),
    (r"\.lora_embedding_[AB]\b", "LoRA of an embedding"),
    (r"\.lora_(B|up)\.bias$|\.lora\.up\.bias$", "LoRA with biases"),
    (r"^bundle_emb\.", "textual inversion"),
    (r"^lora_controlnet$", "Control-LoRA"),
)
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_DOTTED = {f"{model}.": model for model in ("unet", "text_encoder", "text_encoder_2")}
MODEL_PREFIXES = (*_KOHYA, *_DOTTED)
# Attention layers under diffusers' names before 0.22, in UNets and in text encoders.
_OLD_UNET = {"to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
PEFT_PREFIX = "base_model.model."


class Place(NamedTuple):
    """A layer of a base model: name of the model in `MODELS`, and name of the layer in it."""

    model: str
    layer: str


class Layer(NamedTuple):
    """A weight that a LoRA can change: its tensor's name in the model, and its shape of two or four axes."""

    tensor: str
    shape: tuple[int, ...]


class Layers:
    """Layers of a base model that a LoRA can change.

    Args:
      models: name of `MODELS` -> tensors under diffusers' names.

    Attributes:
      by_model: model -> name of a layer -> the layer. Names in text encoders have no `text_model.`.
    """

    def __init__(self, models: Mapping[str, Tensors]):
        self.by_model: dict[str, dict[str, Layer]] = {}
        for model, tensors in models.items():
            if model == "vae":
                continue
            found = self.by_model[model] = {}
            for tensor, weight in tensors.by_name.items():
                layer = MODELS[model].name(tensor)
                if layer.endswith(".weight") and len(weight.shape) in (2, 4) and not layer.startswith("embeddings."):
                    found[layer.removesuffix(".weight")] = Layer(tensor, weight.shape)
        first = (name.split(".") for name in self.by_model["unet"] if name.startswith("down_blocks.0.resnets."))
        self._layers_per_block = len({number for _, _, _, number, *_ in first})

    def find(self, path: Path, place: Place) -> Layer:
        """The layer at a place.

        Args:
          path: of the LoRA, for errors.
          place: of `place`.

        Raises:
          PSAError: the base model has no such layer.
        """
        model, layer = place
        if model not in self.by_model:
            raise PSAError(
                f"{path}: changes {model}, and there is only {' and '.join(self.by_model)} here; "
                "the LoRA is for another base model"
            )
        if layer not in self.by_model[model]:
            raise PSAError(f"{path}: {layer} is no layer of the {model} here; the LoRA is for another base model")
        return self.by_model[model][layer]

    def place(self, name: str, model: str | None) -> Place:
        """Place of a layer's name in a LoRA file.

        Args:
          name: of `split_name`.
          model: of names without a model; None for the UNet.
        """
        for prefix, kohya in _KOHYA.items():
            if name.startswith(prefix):
                return Place(kohya, self._unflattened(kohya, name.removeprefix(prefix)))
        for prefix, dotted in _DOTTED.items():
            if model is None and name.startswith(prefix):
                model, name = dotted, name.removeprefix(prefix)
        model = model or "unet"
        head, dot, last = MODELS[model].name(name).replace(".processor.", ".").rpartition(".")
        return Place(model, f"{head}{dot}{(_OLD_UNET if model == 'unet' else _OLD_TEXT).get(last, last)}")

    def _unflattened(self, model: str, flat: str) -> str:
        """Name of the layer that is spelled with underscores like this; the argument itself if there is none."""
        if model != "unet":
            return self._flat.get(model, {}).get(flat.removeprefix("text_model_"), flat)
        known = self._flat[model]
        return known.get(flat) or known.get(ldm_layer(flat, self._layers_per_block).replace(".", "_"), flat)

    @functools.cached_property
    def _flat(self) -> Mapping[str, Mapping[str, str]]:
        return {model: {layer.replace(".", "_"): layer for layer in layers} for model, layers in self.by_model.items()}


def split_name(path: Path, name: str) -> tuple[str, str]:
    """Layer and part of a tensor's name in a LoRA file.

    Args:
      path: of the file, for errors.
      name: of the tensor.

    Returns:
      The name without its end, and "down", "up" or "alpha".

    Raises:
      PSAError: a tensor of another method, or none of a LoRA.
    """
    for pattern, method in _METHODS:
        if re.search(pattern, name):
            raise PSAError(f"{path}: {name} is of {method}; only LoRA can be merged here; {MERGE_ELSEWHERE}")
    for end, part in _ENDS.items():
        if name.endswith(end) and len(name) > len(end):
            return name.removesuffix(end), part
    raise PSAError(
        f"{path}: {name} is no tensor of a LoRA (they are lora_A and lora_B, or lora_down and lora_up, and alpha)"
    )
