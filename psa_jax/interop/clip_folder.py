"""CLIP models in transformers' layout: both towers of a whole CLIPModel, or the vision tower alone."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from psa_jax.errors import PSAError
from psa_jax.interop.parts import MODELS, read_tokenizer
from psa_jax.interop.weights import Tensors, abstract_model, find_weights, load_weights, open_tensors, shards_of
from psa_jax.json_input import read_json
from psa_jax.models.clip import CLIPText
from psa_jax.models.clip_vision import CLIPVision
from psa_jax.models.config import CLIPTextConfig, CLIPVisionConfig

_PARTS = ("vision_model.", "visual_projection.")


class ClipVisionFolder(NamedTuple):
    """The vision tower of a folder.

    Attributes:
      model: the tower.
      processor: transformers' processor of pictures, with the folder's settings.
      weights: sha256 of the weight files and of the settings of model and processor.
    """

    model: CLIPVision
    processor: object
    weights: str


def load_clip_vision(folder: Path) -> ClipVisionFolder:
    """Loads the vision tower.

    Raises:
      PSAError: not such a folder, or one whose pictures have another size than its weights.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # imported late: slow

    if not (folder / "preprocessor_config.json").is_file():
        raise PSAError(f"{folder}: no preprocessor_config.json; give a folder of a CLIP model with its vision tower")
    config = CLIPVisionConfig.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    crop = processor.crop_size
    if (crop["height"], crop["width"]) != (config.image_size, config.image_size):
        raise PSAError(
            f"{folder}: preprocessor_config.json crops to {crop['height']} x {crop['width']}, the weights take "
            f"{config.image_size} x {config.image_size}; take both from one model"
        )
    path = find_weights(folder, "model")
    tensors = open_tensors(path)
    ours = {name: each for name, each in tensors.by_name.items() if name.startswith(_PARTS)}
    if not ours:
        raise PSAError(f"{path}: no vision tower in it; give a folder of a whole CLIP model")
    model = load_weights(
        abstract_model(CLIPVision, config), Tensors(tensors.where, ours), lambda name: name.removeprefix(_PARTS[0])
    )
    return ClipVisionFolder(model, processor, _digest(path, folder))


def load_clip_text(folder: Path) -> tuple[CLIPText, object]:
    """Loads the text tower with its projection, and the tokenizer.

    Raises:
      PSAError: not a folder of a whole CLIP model.
    """
    path = folder / "config.json"
    found = read_json(path)
    if isinstance(found.get("text_config"), dict):  # the projection is as wide as the whole says
        found["text_config"] = {**found["text_config"], "projection_dim": found.get("projection_dim", 512)}
    part = MODELS["text_encoder_2"]
    config = CLIPTextConfig.from_json({**found, "architectures": [part.class_name]}, str(path))
    model = load_weights(abstract_model(CLIPText, config), find_weights(folder, "model"), part.name)
    return model, read_tokenizer(folder)


def _digest(path: Path, folder: Path) -> str:
    """sha256 of the weight file, or of all files of an index, and of the settings."""
    files = sorted({path.parent / name for name in shards_of(path)}) if path.suffix == ".json" else [path]
    files += [folder / "config.json", folder / "preprocessor_config.json"]
    whole = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            whole.update(hashlib.file_digest(opened, "sha256").digest())
    return whole.hexdigest()
