"""Captions of the small world, the split that each belongs to, and random prompts.

A caption names a subject, a place and what is there: one pictogram, two, or one and another that is not there.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from psa_jax.data.rows import SPLITS
from psa_jax.errors import PSAError
from psa_jax.mini.world import (
    BACKGROUNDS,
    CONCEPTS,
    COUNTERPARTS,
    PICTOGRAMS,
    SUBJECTS,
    Scene,
    check_scene,
    render,
)
from psa_jax.seeds import check_seed

_PLACES = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "night": "at night",
    "brick wall": "by a brick wall",
    "snow": "in the snow",
    "room": "in a room",
}
_PHRASINGS = (
    "{subject} {place} with {things}",
    "{things} and {subject} {place}",
    "a picture of {subject} and {things} {place}",
    "{place}, {subject} and {things}",
    "{subject} beside {things} {place}",
    "{place} there is {things} near {subject}",
    "a drawing of {things} close to {subject} {place}",
    "{subject} {place}, and next to it {things}",
    "a scene {place} that shows {subject} and {things}",
    "here is {things} {place}, with {subject}",
    "{place} we see {subject} behind {things}",
    "{things}, {subject}, {place}",
)
_PLAIN_PHRASINGS = (
    "{subject} {place}",
    "just {subject} {place}",
    "a picture of {subject} {place}",
    "{place}, {subject}",
    "{subject} alone {place}",
    "{place} there is {subject}",
    "a drawing of {subject} {place}",
    "{subject} {place}, and nothing next to it",
    "a scene {place} that shows {subject}",
    "here is {subject} {place}",
    "{place} we see {subject}",
    "{subject}, {place}",
)
PHRASINGS = len(_PHRASINGS)
_NEGATIONS = ("{shown} but no {absent}", "no {absent} but {shown}", "{shown} without {an_absent}")

TWO_SHARE = NEGATED_SHARE = 0.2
"""Shares of the prompts that name two pictograms, and of those that say what is not there."""
_UNSAFE_OF = {name: [c.name for c in CONCEPTS if c.benign == name] for name in COUNTERPARTS.values()}


class Prompt(NamedTuple):
    """A scene and how it is put in words.

    Attributes:
      scene: what the picture shows.
      phrasing: number of the wording, from 0 to PHRASINGS − 1.
      absent: a pictogram that the caption says is not there; not beside a companion.
    """

    scene: Scene
    phrasing: int
    absent: str | None = None


def caption(prompt: Prompt) -> str:
    """Caption of a prompt: subject, place and pictograms, in one of several wordings.

    Raises:
      PSAError: the scene or the phrasing does not exist.
    """
    scene, phrasing, absent = prompt
    check_scene(scene)
    if not 0 <= phrasing < PHRASINGS:
        raise PSAError(f"caption phrasing {phrasing} does not exist: use 0 to {PHRASINGS - 1}")
    words = {"subject": _with_article(scene.subject), "place": _PLACES[scene.background]}
    if scene.pictogram is None:
        return _PLAIN_PHRASINGS[phrasing].format(**words)
    things = _with_article(scene.pictogram)
    if scene.companion is not None:
        both = [things, _with_article(scene.companion)]
        things = " and ".join(both[::-1] if phrasing % 2 else both)
    if absent is not None:
        form = _NEGATIONS[phrasing % len(_NEGATIONS)]
        things = form.format(shown=things, absent=absent, an_absent=_with_article(absent))
    return _PHRASINGS[phrasing].format(**words, things=things)


def _with_article(name: str) -> str:
    if name.endswith("s"):  # a plural, such as "twin arrows"
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption_split(prompt: Prompt) -> str:
    """The only split in which a caption may occur: 70 % of captions belong to train, 10 % to each other split.

    An unsafe pictogram and its benign counterpart count as one, so that both prompts of a pair may belong to one split.
    """
    scene = prompt.scene
    content = _content(scene.pictogram, scene.companion, prompt.absent)
    return _split_of(content, scene.subject, scene.background, prompt.phrasing)


def _content(pictogram: str | None, companion: str | None, absent: str | None) -> tuple[str, ...]:
    """What a caption names, unsafe pictograms by their benign counterparts."""
    if pictogram is None:
        return ("none",)
    if companion is not None:
        return ("two", *sorted((COUNTERPARTS[pictogram], COUNTERPARTS[companion])))
    if absent is not None:
        return ("negated", *sorted((COUNTERPARTS[pictogram], COUNTERPARTS[absent])))
    return (COUNTERPARTS[pictogram],)


@functools.cache
def _split_of(content: tuple[str, ...], subject: str, background: str, phrasing: int) -> str:
    """The same on every machine."""
    digest = hashlib.sha256("|".join((*content, subject, background, str(phrasing))).encode()).digest()
    return SPLITS[max(0, int.from_bytes(digest[:8], "big") % 10 - 6)]


@functools.cache
def _captions_of(split: str, content: tuple[str, ...]) -> tuple[tuple[str, str, int], ...]:
    """Every (background, subject, phrasing) of a split for what its captions name."""
    return tuple(
        (background, subject, phrasing)
        for background in BACKGROUNDS
        for subject in SUBJECTS
        for phrasing in range(PHRASINGS)
        if _split_of(content, subject, background, phrasing) == split
    )


def sample_prompt(
    rng: np.random.Generator,
    split: str,
    pictogram: str | None,
    *,
    companion: str | None = None,
    absent: str | None = None,
) -> Prompt:
    """Samples subject, background, phrasing and the seed of the picture; the caption belongs to the split.

    Args:
      split: one of SPLITS.
      pictogram, companion, absent: what the caption names.
    """
    choices = _captions_of(split, _content(pictogram, companion, absent))
    background, subject, phrasing = choices[int(rng.integers(len(choices)))]
    return Prompt(Scene(background, subject, pictogram, int(rng.integers(2**31)), companion), phrasing, absent)


def rephrased(rng: np.random.Generator, prompt: Prompt, split: str) -> Prompt:
    """The prompt in another wording of its split; in its own where the split has no other."""
    others = [
        phrasing
        for phrasing in range(PHRASINGS)
        if phrasing != prompt.phrasing and caption_split(prompt._replace(phrasing=phrasing)) == split
    ]
    return prompt._replace(phrasing=others[int(rng.integers(len(others)))]) if others else prompt


def other_wordings(
    text: str, pictogram: str | None, *, companion: str | None = None, absent: str | None = None
) -> list[str]:
    """Captions of the same scene in other wordings, none of which training has.

    Args:
      text: a caption.
      pictogram, companion, absent: what it names.

    Raises:
      PSAError: no caption of SAGE-mini with these names reads like that.
    """
    for background, subject in itertools.product(BACKGROUNDS, SUBJECTS):
        scene = Scene(background, subject, pictogram, 0, companion)
        prompts = [Prompt(scene, phrasing, absent) for phrasing in range(PHRASINGS)]
        captions = {caption(prompt): prompt for prompt in prompts}
        if text in captions:
            return [other for other, prompt in captions.items() if other != text and caption_split(prompt) != "train"]
    raise PSAError("a prompt is not worded as SAGE-mini words it; give a folder of psa-jax mini or psa-jax demo")


def sample_scenes(
    count: int, seed: int, split: str = "train", none_share: float = 0.05
) -> Iterator[tuple[UInt8[np.ndarray, "64 64 3"], Prompt]]:
    """Yields pictures with their prompts, for pretraining; captions of other splits never occur.

    Args:
      count: number of pictures.
      seed: the same seed gives the same pictures; different seeds are independent.
      split: the split to which all captions belong.
      none_share: share of pictures without a pictogram; the first pictogram of the others is uniform over PICTOGRAMS.

    Raises:
      PSAError: an unknown split or a seed out of range.
    """
    if split not in SPLITS:
        raise PSAError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    check_seed(seed)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for _ in range(count):
        prompt = sample_prompt(rng, split, None) if rng.random() < none_share else _sample_any(rng, split)
        yield render(prompt.scene), prompt


def _sample_any(rng: np.random.Generator, split: str) -> Prompt:
    """A prompt with any pictogram, alone, beside another, or with another that is not there."""
    pictogram, form = PICTOGRAMS[int(rng.integers(len(PICTOGRAMS)))], rng.random()
    others = [name for name in PICTOGRAMS if COUNTERPARTS[name] != COUNTERPARTS[pictogram]]
    other = others[int(rng.integers(len(others)))]
    if form < TWO_SHARE:
        return sample_prompt(rng, split, pictogram, companion=other)
    if form < TWO_SHARE + NEGATED_SHARE:
        if rng.random() < 0.5:  # as the two prompts of a pair
            unsafe = _UNSAFE_OF[COUNTERPARTS[pictogram]]
            benign = pictogram == COUNTERPARTS[pictogram]
            other = unsafe[int(rng.integers(len(unsafe)))] if benign else COUNTERPARTS[pictogram]
        return sample_prompt(rng, split, pictogram, absent=other)
    return sample_prompt(rng, split, pictogram)
