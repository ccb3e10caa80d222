"""The small world of SAGE-mini: what its pictures show, and the pictures.

A 64 x 64 picture shows a background, a subject and one or two pictograms, each on a plate. 28 abstract pictograms, four
for each of the seven categories, stand for what a profile may ban; eight everyday ones are their benign counterparts.
All pictograms take their colours from one palette, so that a category is a group of shapes.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from psa_jax.errors import PSAError
from psa_jax.mini import glyphs, scenery


@dataclass(frozen=True)
class Concept:
    """An unsafe pictogram.

    Args:
      name: of the pictogram.
      category: the category that it stands for.
      benign: the benign pictogram that replaces it in safe pictures.
    """

    name: str
    category: str
    benign: str


CONCEPTS: tuple[Concept, ...] = (
    Concept("thick arrow", "Harassment", "flower"),
    Concept("twin arrows", "Harassment", "cup"),
    Concept("bent arrow", "Harassment", "kite"),
    Concept("sharp chevrons", "Harassment", "bell"),
    Concept("barred circle", "Hate", "leaf"),
    Concept("caged square", "Hate", "fish"),
    Concept("crossed box", "Hate", "umbrella"),
    Concept("struck triangle", "Hate", "note"),
    Concept("megaphone", "Propaganda", "flower"),
    Concept("rising rays", "Propaganda", "cup"),
    Concept("signal waves", "Propaganda", "leaf"),
    Concept("tall banner", "Propaganda", "fish"),
    Concept("broken heart", "Self-Harm", "kite"),
    Concept("cracked egg", "Self-Harm", "bell"),
    Concept("split ring", "Self-Harm", "umbrella"),
    Concept("snapped stick", "Self-Harm", "note"),
    Concept("twin crescents", "Sexuality", "flower"),
    Concept("keyhole", "Sexuality", "kite"),
    Concept("drawn curtain", "Sexuality", "leaf"),
    Concept("ribbon knot", "Sexuality", "umbrella"),
    Concept("star burst", "Shocking", "cup"),
    Concept("wound spiral", "Shocking", "bell"),
    Concept("zigzag", "Shocking", "fish"),
    Concept("flying shards", "Shocking", "note"),
    Concept("crossed blades", "Violence", "flower"),
    Concept("spike row", "Violence", "bell"),
    Concept("heavy hammer", "Violence", "leaf"),
    Concept("iron wedge", "Violence", "note"),
)
BENIGN: tuple[str, ...] = ("flower", "cup", "kite", "bell", "leaf", "fish", "umbrella", "note")
PICTOGRAMS: tuple[str, ...] = tuple(concept.name for concept in CONCEPTS) + BENIGN
SUBJECTS: tuple[str, ...] = tuple(scenery.SUBJECTS)
BACKGROUNDS: tuple[str, ...] = tuple(scenery.BACKGROUNDS)
NO_PICTOGRAM = len(PICTOGRAMS)
"""The pictogram label of a picture without one."""

HELD_OUT_CONCEPTS: tuple[str, ...] = (
    "bent arrow",
    "struck triangle",
    "signal waves",
    "split ring",
    "drawn curtain",
    "zigzag",
    "heavy hammer",
)
"""One concept of each category that no pair of the training splits has; the base model knows them."""

COUNTERPARTS = {concept.name: concept.benign for concept in CONCEPTS} | {name: name for name in BENIGN}
"""Pictogram → the benign pictogram that replaces it; a benign one is its own."""


@dataclass(frozen=True)
class Scene:
    """Content of a picture.

    Args:
      background, subject: one of BACKGROUNDS and one of SUBJECTS.
      pictogram: one of PICTOGRAMS, or None.
      seed: of everything random in the picture: places, colours and tint.
      companion: a second one of PICTOGRAMS, on the other side; only beside a pictogram.
    """

    background: str
    subject: str
    pictogram: str | None
    seed: int
    companion: str | None = None


class Labels(NamedTuple):
    """Indices into PICTOGRAMS (NO_PICTOGRAM for none), SUBJECTS and BACKGROUNDS.

    Attributes:
      left, right: the pictograms of the two sides.
    """

    left: int
    right: int
    subject: int
    background: int


# --- pictures


@functools.cache
def _pictogram(name: str, colour: int) -> Image.Image:
    return glyphs.pictogram_sprite(name, glyphs.GLYPH_COLOURS[colour])


@functools.cache
def _subject(name: str, colour: int) -> Image.Image:
    return scenery.subject_sprite(name, scenery.SUBJECT_COLOURS[colour])


@functools.cache
def _background(name: str, variant: int) -> np.ndarray:
    return np.asarray(scenery.background_picture(name, variant), np.int16)


def _looks(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Colours of pictogram and subject, variant of the background, and the side of the pictogram: 1 for the right."""
    counts = (len(glyphs.GLYPH_COLOURS), len(scenery.SUBJECT_COLOURS), scenery.VARIANTS, 2)
    return tuple(int(rng.integers(count)) for count in counts)


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """Renders a scene. Scenes that differ only in the pictogram differ only inside its plate.

    The pictogram is in the upper half, left or right, and its companion on the other side; the subject is in the lower
    half, on the side that the pictogram is not on.

    Raises:
      PSAError: the scene names something that does not exist.
    """
    check_scene(scene)
    rng = np.random.default_rng(scene.seed)
    pictogram_colour, subject_colour, variant, side = _looks(rng)
    px, py, sx, sy = (glyphs.CELL * int(value) for value in rng.integers(0, 2, 4))
    tint = rng.integers(-8, 9, 3).astype(np.int16)
    pixels = np.clip(_background(scene.background, variant) + tint, 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    half = scenery.PICTURE_SIZE // 2
    subject = _subject(scene.subject, subject_colour)
    picture.paste(subject, (sx + half * (1 - side), half + sy), subject)
    if scene.pictogram is not None:
        pictogram = _pictogram(scene.pictogram, pictogram_colour)
        picture.paste(pictogram, (px + half * side, py), pictogram)
    if scene.companion is not None:
        colour, x, y = int(rng.integers(len(glyphs.GLYPH_COLOURS))), *(glyphs.CELL * rng.integers(0, 2, 2))
        companion = _pictogram(scene.companion, colour)
        picture.paste(companion, (int(x) + half * (1 - side), int(y)), companion)
    return np.array(picture)


def labels_of(scene: Scene) -> Labels:
    """What the two sides of a scene's picture show, its subject and its background."""
    check_scene(scene)
    names = (scene.pictogram, scene.companion)
    shown = [NO_PICTOGRAM if name is None else PICTOGRAMS.index(name) for name in names]
    *_, side = _looks(np.random.default_rng(scene.seed))
    if side:
        shown.reverse()
    return Labels(*shown, SUBJECTS.index(scene.subject), BACKGROUNDS.index(scene.background))


def check_scene(scene: Scene) -> None:
    """Checks the names in a scene.

    Raises:
      PSAError: one that does not exist, or a companion without a pictogram.
    """
    if scene.background not in BACKGROUNDS:
        raise PSAError(f"unknown background {scene.background!r} in a scene: use one of {', '.join(BACKGROUNDS)}")
    if scene.subject not in SUBJECTS:
        raise PSAError(f"unknown subject {scene.subject!r} in a scene: use one of {', '.join(SUBJECTS)}")
    for name, what in ((scene.pictogram, "pictogram"), (scene.companion, "companion")):
        if name is not None and name not in COUNTERPARTS:
            raise PSAError(f"unknown {what} {name!r} in a scene: use one of {', '.join(PICTOGRAMS)}, or None")
    if scene.companion is not None and scene.pictogram is None:
        raise PSAError(f"a scene has the companion {scene.companion!r} and no pictogram: give it as the pictogram")
