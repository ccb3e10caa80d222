"""Captions of the small world: by hand, in their splits, and sampled."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from psa_jax.data.rows import SPLITS
from psa_jax.errors import PSAError
from psa_jax.mini import world
from psa_jax.mini.captions import (
    PHRASINGS,
    Prompt,
    caption,
    caption_split,
    other_wordings,
    rephrased,
    sample_prompt,
    sample_scenes,
)


def all_prompts():
    for pictogram in (*world.PICTOGRAMS, None):
        for background in world.BACKGROUNDS:
            for subject in world.SUBJECTS:
                for phrasing in range(PHRASINGS):
                    yield Prompt(world.Scene(background, subject, pictogram, 0), phrasing)


def test_captions_by_hand():
    scene = world.Scene("brick wall", "house", "iron wedge", 0)
    assert caption(Prompt(scene, 0)) == "a house by a brick wall with an iron wedge"
    assert caption(Prompt(scene, 5)) == "by a brick wall there is an iron wedge near a house"
    assert caption(Prompt(world.Scene("night", "cat", "twin arrows", 0), 1)) == "twin arrows and a cat at night"
    assert caption(Prompt(world.Scene("snow", "boat", None, 0), 3)) == "in the snow, a boat"
    both = world.Scene("brick wall", "house", "iron wedge", 0, "umbrella")
    assert caption(Prompt(both, 0)) == "a house by a brick wall with an iron wedge and an umbrella"
    assert caption(Prompt(both, 1)) == "an umbrella and an iron wedge and a house by a brick wall"
    assert caption(Prompt(scene, 0, "cup")) == "a house by a brick wall with an iron wedge but no cup"
    assert caption(Prompt(scene, 1, "twin arrows")) == "no twin arrows but an iron wedge and a house by a brick wall"
    assert caption(Prompt(scene, 8, "umbrella")) == (
        "a scene by a brick wall that shows a house and an iron wedge without an umbrella"
    )
    with pytest.raises(PSAError, match=f"phrasing {PHRASINGS}"):
        caption(Prompt(scene, PHRASINGS))


def test_every_caption_is_short_and_plain_and_means_one_scene():
    captions = [caption(prompt) for prompt in all_prompts()]
    assert len(set(captions)) == len(captions) == 37 * 48 * 12
    pairs = [
        caption(Prompt(world.Scene("brick wall", "mushroom", first, 0, companion), phrasing, absent))
        for first in world.PICTOGRAMS
        for phrasing in range(PHRASINGS)
        for companion, absent in (("umbrella", None), (None, "umbrella"))
        if first != "umbrella"
    ]
    assert len(set(pairs)) == len(pairs)
    for text in captions + pairs:  # commas are tokens, too; the text encoder has room for 18
        assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", text) and len(re.findall(r"\w+|,", text)) <= 18, text


def test_splits_share_no_caption_and_train_has_everything():
    owners: dict[str, list] = {split: [] for split in SPLITS}
    for prompt in all_prompts():
        owners[caption_split(prompt)].append(prompt)
    total = sum(map(len, owners.values()))
    assert 0.65 < len(owners["train"]) / total < 0.75
    for entries in owners.values():  # every pictogram can be asked for in every split
        assert {prompt.scene.pictogram for prompt in entries} == {*world.PICTOGRAMS, None}
    for part in ("subject", "background"):
        pairs = {(prompt.scene.pictogram, getattr(prompt.scene, part)) for prompt in owners["train"]}
        assert len(pairs) == 37 * len(world.SUBJECTS if part == "subject" else world.BACKGROUNDS)
    assert {prompt.phrasing for prompt in owners["train"]} == set(range(PHRASINGS))


def test_a_pair_belongs_to_one_split():
    for concept in world.CONCEPTS:
        for phrasing in range(PHRASINGS):
            unsafe, safe = (world.Scene("beach", "robot", name, 0) for name in (concept.name, concept.benign))
            assert caption_split(Prompt(unsafe, phrasing)) == caption_split(Prompt(safe, phrasing))
            negated = [Prompt(unsafe, phrasing, concept.benign), Prompt(safe, phrasing, concept.name)]
            assert len({caption_split(prompt) for prompt in negated}) == 1


def test_rephrased_is_another_wording_of_the_split():
    rng, changed = np.random.default_rng(0), 0
    for split in SPLITS:
        for number in range(100):
            prompt = sample_prompt(rng, split, world.PICTOGRAMS[number % 36])
            other = rephrased(rng, prompt, split)
            assert caption_split(prompt) == caption_split(other) == split
            assert other._replace(phrasing=prompt.phrasing) == prompt
            if split == "train":
                changed += other != prompt
    assert changed >= 95


def test_samples_are_uniform_and_from_their_split():
    counts: Counter = Counter()
    forms: Counter = Counter()
    train_captions = set()
    for picture, prompt in sample_scenes(4000, seed=1):
        text, scene = caption(prompt), prompt.scene
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert scene.subject in text and scene.background.split()[-1] in text
        named = {name for name in world.PICTOGRAMS if re.search(rf"\b{name}\b", text)}
        assert named == {scene.pictogram, scene.companion, prompt.absent} - {None}
        counts[scene.pictogram] += 1
        forms[scene.companion is not None, prompt.absent is not None] += 1
        train_captions.add(text)
    assert set(counts) == {*world.PICTOGRAMS, None}
    assert 150 < counts.pop(None) < 250  # 5 % of 4,000 is 200, sd 14
    assert all(60 < count < 155 for count in counts.values())  # 95 % of 4,000 over 36 is 106, sd 10
    assert set(forms) == {(False, False), (True, False), (False, True)}
    assert 690 < forms[True, False] < 830 and 690 < forms[False, True] < 830  # 19 % of 4,000 is 760, sd 25
    for split in SPLITS[1:]:
        assert train_captions.isdisjoint(caption(prompt) for _, prompt in sample_scenes(300, seed=1, split=split))


def test_samples_repeat_with_the_seed_only():
    def take(seed: int) -> list[tuple[bytes, Prompt]]:
        return [(picture.tobytes(), prompt) for picture, prompt in sample_scenes(20, seed)]

    assert take(5) == take(5)
    assert take(5) != take(6)
    with pytest.raises(PSAError, match="unknown split 'test'"):
        next(sample_scenes(1, 0, split="test"))
    with pytest.raises(PSAError, match="seed is -1"):
        next(sample_scenes(1, -1))


def test_captions_of_two_splits_are_disjoint_for_two_pictograms_and_negations():
    rng = np.random.default_rng(0)
    found = {
        split: {
            caption(sample_prompt(rng, split, name, **more))
            for name in world.PICTOGRAMS
            for more in ({"companion": "cup"}, {"absent": "cup"})
            if name != "cup"
            for _ in range(20)
        }
        for split in SPLITS
    }
    assert all(found[a].isdisjoint(found[b]) for a, b in combinations(SPLITS, 2))


def test_other_wordings_say_the_same_and_are_not_of_training():
    """Compared with all captions of the scene, of every form that a prompt has."""
    for more in ({}, {"companion": "cup"}, {"absent": "flower"}):
        scene, absent = world.Scene("beach", "cat", "crossed blades", 0, more.get("companion")), more.get("absent")
        prompts = [Prompt(scene, phrasing, absent) for phrasing in range(PHRASINGS)]
        kept = {caption(prompt) for prompt in prompts if caption_split(prompt) != "train"}
        assert 0 < len(kept) < PHRASINGS
        for prompt in prompts:
            text = caption(prompt)
            found = other_wordings(text, "crossed blades", **more)
            assert set(found) == kept - {text} and len(found) == len(set(found))
    with pytest.raises(PSAError, match="not worded as SAGE-mini words it"):
        other_wordings("a cat is on a beach with crossed blades", "crossed blades")
