"""CLIP's vision tower and both embeddings, against transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from support.clip_folders import HUGE_14, LARGE_14, VISION, save_clip
from support.torch_models import TOLERANCE
from transformers import CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from psa_jax.errors import PSAError
from psa_jax.evaluation.clip_embeddings import ClipEmbeddings
from psa_jax.interop.clip_folder import load_clip_vision


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "model"
    return folder, save_clip(folder)


def pictures(count: int) -> list[np.ndarray]:
    """Of several sizes, the first of them smooth, so that resizing matters."""
    random = np.random.default_rng(1)
    sizes = [(40, 60), (28, 28), (90, 33), (31, 200)]
    small = [random.integers(0, 256, (h // 5 + 1, w // 5 + 1, 3), dtype=np.uint8) for h, w in sizes]
    large = [np.asarray(Image.fromarray(each).resize((w, h), 2)) for each, (h, w) in zip(small, sizes, strict=True)]
    return [large[index % len(large)] // (1 + index // len(large)) for index in range(count)]


def test_embeddings_of_pictures_and_texts(clip):
    """More than a batch, with the pixels of transformers' own processor."""
    folder, theirs = clip
    ours, drawn = ClipEmbeddings(folder), pictures(19)
    processor = load_clip_vision(folder).processor
    pixels = np.concatenate(
        [processor(images=Image.fromarray(each), return_tensors="np").pixel_values for each in drawn]
    )
    wanted = theirs.get_image_features(torch.from_numpy(pixels)).pooler_output
    found = ours.pictures(drawn)
    np.testing.assert_allclose(found, wanted / wanted.norm(dim=-1, keepdim=True), atol=TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, atol=1e-12)
    texts = ["cat", "a cat on a mat", "a " * 200]
    ids = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, truncation=True, return_tensors="pt")
    wanted = theirs.get_text_features(**ids).pooler_output
    np.testing.assert_allclose(ours.texts(texts), wanted / wanted.norm(dim=-1, keepdim=True), atol=TOLERANCE)
    assert ours.width == 24


def test_the_tower_alone_is_a_folder_too(clip, tmp_path):
    folder, theirs = clip
    alone = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=24))
    alone.load_state_dict(
        {name: each for name, each in theirs.state_dict().items() if name.startswith(("vision_model.", "visual_p"))}
    )
    alone.save_pretrained(tmp_path / "alone")
    (tmp_path / "alone" / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    whole, part = ClipEmbeddings(folder), ClipEmbeddings(tmp_path / "alone")
    np.testing.assert_array_equal(whole.pictures(pictures(3)), part.pictures(pictures(3)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"crop_size": {"height": 20, "width": 20}}, "crops to 20 x 20, the weights take 28 x 28"),
        (None, "no preprocessor_config.json; give a folder of a CLIP model with its vision tower"),
    ],
)
def test_a_processor_that_is_not_the_models(clip, tmp_path, change, says):
    folder, _ = clip
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "preprocessor_config.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PSAError, match=says):
        load_clip_vision(tmp_path)


def test_a_value_that_changes_the_tower_is_refused_by_name(clip, tmp_path):
    folder, _ = clip
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    for key, value in {"hidden_act": "relu", "num_channels": 4, "patch_size": 0}.items():
        path.write_text(json.dumps(whole | {"vision_config": whole["vision_config"] | {key: value}}))
        with pytest.raises(PSAError, match=key):
            load_clip_vision(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("sizes", "width"), [(LARGE_14, 768), (HUGE_14, 1024)], ids=["L14", "H14"])
def test_full_size(tmp_path, sizes, width):
    theirs = save_clip(tmp_path / "clip", sizes, width)
    loaded = load_clip_vision(tmp_path / "clip")
    pixels = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    graph, params = nnx.split(loaded.model)
    found = np.asarray(nnx.merge(graph, params)(jnp.asarray(pixels)))
    wanted = theirs.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()
    print(f"largest difference {np.abs(found - wanted).max():.2e} at a largest value of {np.abs(wanted).max():.2f}")
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)
