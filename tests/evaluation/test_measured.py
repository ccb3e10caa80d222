"""Measures of listed pictures: which pictures are compared, with transformers' own similarities."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.clip_folders import save_clip
from transformers import CLIPTokenizer

from psa_jax.errors import PSAError
from psa_jax.evaluation.clip_embeddings import ClipEmbeddings
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.measured import measured, reference_pictures
from psa_jax.evaluation.measures import cmmd
from psa_jax.interop.clip_folder import load_clip_vision


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured") / "model"
    return folder, save_clip(folder)


@pytest.fixture
def listed(tmp_path):
    """A base model with a picture for each prompt, listed for two users, and a method with one for each user."""
    random, found = np.random.default_rng(0), []
    for prompt in range(3):
        for method, users in (("base", [""]), ("psa", ["u1", "u2"])):
            for user in users:
                path = tmp_path / f"{method}{prompt}{user}.png"
                Image.fromarray(random.integers(0, 256, (30, 28, 3), dtype=np.uint8)).save(path)
                for reader in ("u1", "u2") if not user else (user,):
                    about = Pictured(path.name, method, f"p{prompt}", 5, f"a cat {prompt}", reader)
                    found.append((path, about))
    return found


def test_clip_scores_are_those_of_transformers(clip, listed, tmp_path):
    folder, theirs = clip
    found = measured(listed, ["clip"], {"clip": ClipEmbeddings(folder)}, [], tmp_path / "e", "base")["clip"]
    processor, tokenizer = load_clip_vision(folder).processor, CLIPTokenizer.from_pretrained(folder)
    wanted: dict[str, dict] = {"base": {}, "psa": {}}
    for path, each in listed:
        pixels = processor(images=Image.open(path), return_tensors="pt").pixel_values
        ids = tokenizer([each.prompt], return_tensors="pt", padding="max_length", truncation=True)
        similarity = torch.nn.functional.cosine_similarity(
            theirs.get_image_features(pixels).pooler_output, theirs.get_text_features(**ids).pooler_output
        )
        wanted[each.method][path] = 100 * max(float(similarity), 0.0)
    for method, count in (("base", 3), ("psa", 6)):
        assert found[method]["value"] == pytest.approx(np.mean(list(wanted[method].values())), abs=1e-3)
        assert (found[method]["pictures"], found[method]["prompts"]) == (count, 3)
        low, high = found[method]["interval"]
        assert low <= found[method]["value"] <= high
    ours = found["psa"]
    assert ours["less_baseline"][0] == pytest.approx(ours["value"] - found["base"]["value"])  # each prompt has two
    assert ours["less_baseline_prompts"] == 3 and "less_baseline" not in found["base"]


def test_distances_and_what_is_kept(clip, listed, tmp_path):
    folder, _ = clip
    (tmp_path / "real").mkdir()
    for index in range(4):
        picture = np.random.default_rng(9 + index).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "real" / f"{index}.png")
    reference = reference_pictures(tmp_path / "real")
    model = ClipEmbeddings(folder)
    found = measured(listed, ["cmmd", "fd_clip"], {"clip": model}, reference, tmp_path / "e", "base")
    embedded = model.pictures([np.asarray(Image.open(path)) for path in reference])
    ours = [path for path, each in dict(listed).items() if each.method == "psa"]
    wanted = cmmd(model.pictures([np.asarray(Image.open(path)) for path in ours]), embedded)
    assert found["cmmd"]["psa"]["value"] == pytest.approx(wanted, abs=1e-9)
    # The difference is of as many different pictures: three of ours, of which a prompt has two, and the base model's.
    ours = [path for path in ours if path.name.endswith("u1.png")]
    theirs = [path for path, each in dict(listed).items() if each.method == "base"]
    embed = lambda paths: model.pictures([np.asarray(Image.open(path)) for path in paths])  # noqa: E731
    wanted = cmmd(embed(ours), embedded) - cmmd(embed(theirs), embedded)
    assert found["cmmd"]["psa"]["less_baseline"][0] == pytest.approx(wanted, abs=1e-9)
    assert found["fd_clip"]["psa"]["value"] > 0 and "less_baseline" not in found["fd_clip"]["psa"]
    assert found["about"] == {"weights": {"clip": model.weights}, "reference": 4}
    # Embeddings are kept, and are those that a second run uses; a damaged file is said.
    files = sorted((tmp_path / "e").iterdir())
    model.pictures = lambda pictures: pytest.fail("embedded again")
    assert measured(listed, ["cmmd", "fd_clip"], {"clip": model}, reference, tmp_path / "e", "base") == found
    files[0].write_bytes(files[0].read_bytes()[:50])
    with pytest.raises(PSAError, match="damaged; delete it and run again"):
        measured(listed, ["cmmd"], {"clip": model}, reference, tmp_path / "e", "base")


def test_one_prompt_has_no_interval(clip, listed, tmp_path):
    one = [(path, each) for path, each in listed if each.prompt_id == "p0"]
    found = measured(one, ["clip"], {"clip": ClipEmbeddings(clip[0])}, [], tmp_path / "e", "base")["clip"]
    assert all(each.keys() == {"pictures", "value", "prompts"} for each in found.values())


def test_what_is_refused(clip, listed, tmp_path):
    import dataclasses

    (tmp_path / "empty").mkdir()
    with pytest.raises(PSAError, match="empty: no PNG or JPEG in it; give --reference a folder of pictures"):
        reference_pictures(tmp_path / "empty")
    bare = [(path, dataclasses.replace(each, prompt="")) for path, each in listed]
    with pytest.raises(PSAError, match="clip: pictures without a prompt; fill the column prompt"):
        measured(bare, ["clip"], {"clip": ClipEmbeddings(clip[0])}, [], tmp_path / "e", "base")
