"""SAGE-mini: a small synthetic world with SAGE's layout, schema and label rule, for tests, demos and the tiny model.

A 64 x 64 picture shows a background, a subject and one pictogram on a plate. 28 abstract pictograms, four for each of
the seven categories, stand for what a profile may ban; eight everyday ones are their benign counterparts. The pictures
of a pair differ only in the pictogram. All pictograms take their colours from one palette, so that a category is a
group of shapes.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from psa_jax.data.sage import SPLITS
from psa_jax.errors import PSAError
from psa_jax.files import replacing_folder, write_private
from psa_jax.mini import glyphs, scenery
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES, UserProfile
from psa_jax.progress import Progress
from psa_jax.seeds import check_seed


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

CONCEPTS_PER_CATEGORY = 3
ROWS_PER_USER = len(CATEGORIES) * CONCEPTS_PER_CATEGORY * 2
POPULATION_SEED = 2025
"""User ids mean the same people in every rendering: the seed never changes the population."""

_COUNTERPART = {concept.name: concept.benign for concept in CONCEPTS} | {name: name for name in BENIGN}
_PLACES = {
    "meadow": "in a meadow",
    "beach": "on a beach",
    "night": "at night",
    "brick wall": "by a brick wall",
    "snow": "in the snow",
    "room": "in a room",
}
_PHRASINGS = (
    "{subject} {place} with {pictogram}",
    "{pictogram} and {subject} {place}",
    "a picture of {subject} and {pictogram} {place}",
    "{place}, {subject} and {pictogram}",
    "{subject} beside {pictogram} {place}",
    "{place} there is {pictogram} near {subject}",
)
_PLAIN_PHRASINGS = (
    "{subject} {place}",
    "just {subject} {place}",
    "a picture of {subject} {place}",
    "{place}, {subject}",
    "{subject} alone {place}",
    "{place} there is {subject}",
)
PHRASINGS = len(_PHRASINGS)


@dataclass(frozen=True)
class Scene:
    """Content of a picture.

    Args:
      background, subject: one of BACKGROUNDS and one of SUBJECTS.
      pictogram: one of PICTOGRAMS, or None.
      seed: of everything random in the picture: places, colours and tint.
    """

    background: str
    subject: str
    pictogram: str | None
    seed: int


class Labels(NamedTuple):
    """Indices into PICTOGRAMS (NO_PICTOGRAM for none), SUBJECTS and BACKGROUNDS."""

    pictogram: int
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


def render(scene: Scene) -> UInt8[np.ndarray, "64 64 3"]:
    """Renders a scene. Scenes that differ only in the pictogram differ only inside its plate.

    The pictogram is in the upper half, left or right; the subject is in the lower half, on the other side.

    Raises:
      PSAError: the scene names something that does not exist.
    """
    _check(scene)
    rng = np.random.default_rng(scene.seed)
    pictogram_colour, subject_colour, variant, side = (
        int(rng.integers(n)) for n in (len(glyphs.GLYPH_COLOURS), len(scenery.SUBJECT_COLOURS), scenery.VARIANTS, 2)
    )
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
    return np.array(picture)


def _check(scene: Scene) -> None:
    if scene.background not in BACKGROUNDS:
        raise PSAError(f"unknown background {scene.background!r} in a scene: use one of {', '.join(BACKGROUNDS)}")
    if scene.subject not in SUBJECTS:
        raise PSAError(f"unknown subject {scene.subject!r} in a scene: use one of {', '.join(SUBJECTS)}")
    if scene.pictogram is not None and scene.pictogram not in _COUNTERPART:
        raise PSAError(f"unknown pictogram {scene.pictogram!r} in a scene: use one of {', '.join(PICTOGRAMS)}, or None")


# --- captions


def _with_article(name: str) -> str:
    if name.endswith("s"):  # a plural, such as "twin arrows"
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def caption(scene: Scene, phrasing: int) -> str:
    """Caption of a scene: subject, place and pictogram (if there is one), in one of several word orders.

    Args:
      scene: what the picture shows.
      phrasing: number of the word order, from 0 to PHRASINGS − 1.

    Raises:
      PSAError: the scene or the phrasing does not exist.
    """
    _check(scene)
    if not 0 <= phrasing < PHRASINGS:
        raise PSAError(f"caption phrasing {phrasing} does not exist: use 0 to {PHRASINGS - 1}")
    words = {"subject": _with_article(scene.subject), "place": _PLACES[scene.background]}
    if scene.pictogram is None:
        return _PLAIN_PHRASINGS[phrasing].format(**words)
    return _PHRASINGS[phrasing].format(**words, pictogram=_with_article(scene.pictogram))


def caption_split(scene: Scene, phrasing: int) -> str:
    """The only split in which a caption may occur: 70 % of captions belong to train, 10 % to each other split.

    An unsafe pictogram and its benign counterpart count as one, so that both prompts of a pair belong to one split.

    Args:
      scene, phrasing: as in `caption`.
    """
    counterpart = _COUNTERPART[scene.pictogram] if scene.pictogram is not None else "none"
    return SPLITS[max(0, _fold(counterpart, scene.subject, scene.background, phrasing) - 6)]


@functools.cache
def _fold(*parts: str | int) -> int:
    """A number from 0 to 9 for a combination, the same on every machine."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10


@functools.cache
def _captions_of(split: str, counterpart: str | None) -> tuple[tuple[str, str, int], ...]:
    """Every (background, subject, phrasing) of a split for a benign pictogram and its unsafe counterparts."""
    return tuple(
        (background, subject, phrasing)
        for background in BACKGROUNDS
        for subject in SUBJECTS
        for phrasing in range(PHRASINGS)
        if caption_split(Scene(background, subject, counterpart, 0), phrasing) == split
    )


def _sample_scene(rng: np.random.Generator, pictogram: str | None, split: str) -> tuple[Scene, int]:
    """Samples a scene and a phrasing whose caption belongs to the split."""
    choices = _captions_of(split, None if pictogram is None else _COUNTERPART[pictogram])
    background, subject, phrasing = choices[int(rng.integers(len(choices)))]
    return Scene(background, subject, pictogram, int(rng.integers(2**31))), phrasing


def sample_scenes(
    count: int, seed: int, split: str = "train", none_share: float = 0.05
) -> Iterator[tuple[UInt8[np.ndarray, "64 64 3"], str, Labels]]:
    """Yields pictures with captions and labels, for pretraining; captions of other splits never occur.

    Args:
      count: number of pictures.
      seed: the same seed gives the same pictures; different seeds are independent.
      split: the split to which all captions belong.
      none_share: share of pictures without a pictogram; the others are uniform over PICTOGRAMS.

    Raises:
      PSAError: an unknown split or a seed out of range.
    """
    if split not in SPLITS:
        raise PSAError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    check_seed(seed)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    for _ in range(count):
        index = int(rng.integers(len(PICTOGRAMS))) if rng.random() >= none_share else NO_PICTOGRAM
        pictogram = PICTOGRAMS[index] if index < NO_PICTOGRAM else None
        scene, phrasing = _sample_scene(rng, pictogram, split)
        labels = Labels(index, SUBJECTS.index(scene.subject), BACKGROUNDS.index(scene.background))
        yield render(scene), caption(scene, phrasing), labels


# --- the data set on disk


def split_sizes(users: int) -> dict[str, int]:
    """Number of users of each split, in SAGE's proportions (900 / 50 / 50 / 50); users of test_seen are in train, too.

    Args:
      users: number of train users.
    """
    others = max(8, users // 18)
    return {"train": users, "val": others, "test_seen": min(users, others), "test_unseen": others}


def render_mini(out: Path, users: int, seed: int) -> dict[str, int]:
    """Writes SAGE-mini in SAGE's layout: for each split, a folder with metadata.jsonl (mode 0600) and its pictures.

    The users are the first ones of the population; concepts, scenes and captions are sampled from `seed`.
    The same arguments give the same bytes. The folder appears complete or not at all.

    Args:
      out: folder to make, absent or empty.
      users: number of train users.
      seed: a number from 0 to 2^32 − 1.

    Returns:
      Rows of each split.

    Raises:
      PSAError: an argument is out of range or the folder cannot be written.
    """
    out = Path(out)
    if users < 1:
        raise PSAError(f"cannot make {users} users: give a number from 1 up")
    check_seed(seed)
    sizes = split_sizes(users)
    population = sample_population(users + sizes["val"] + sizes["test_unseen"], seed=POPULATION_SEED)
    train, others = population[:users], population[users:]
    seen = np.sort(np.random.default_rng([seed, len(SPLITS)]).choice(users, sizes["test_seen"], replace=False))
    members = {
        "train": train,
        "val": others[: sizes["val"]],
        "test_seen": [train[int(index)] for index in seen],
        "test_unseen": others[sizes["val"] :],
    }
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise PSAError(f"{out} exists and is not an empty folder: give a new folder or remove it first")
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(out) as whole:
            whole.mkdir(mode=0o700)
            with Progress(sum(map(len, members.values())), "user", "rendering SAGE-mini") as progress:
                counts = {split: _write_split(whole / split, split, members[split], seed, progress) for split in SPLITS}
    except OSError as error:
        reason = error.strerror or str(error)
        raise PSAError(f"cannot write {out}: {reason}; check the path, its permissions and space") from error
    return counts


def _write_split(folder: Path, split: str, profiles: Sequence[UserProfile], seed: int, progress: Progress) -> int:
    """Renders one split and returns its number of rows."""
    folder.mkdir(parents=True)
    rows: list[dict] = []
    for profile in profiles:
        rng = np.random.default_rng([seed, SPLITS.index(split), int(profile.user_id)])
        for category in CATEGORIES:
            family = [concept for concept in CONCEPTS if concept.category == category]
            for choice in sorted(rng.choice(len(family), CONCEPTS_PER_CATEGORY, replace=False)):
                rows += _write_pair(folder, split, profile, family[int(choice)], len(rows) // 2, rng)
        progress.step()
    write_private(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    return len(rows)


def _write_pair(
    folder: Path, split: str, profile: UserProfile, concept: Concept, index: int, rng: np.random.Generator
) -> list[dict]:
    """Saves the two pictures of a pair; returns its two rows, with the unsafe and with the safe prompt."""
    unsafe, phrasing = _sample_scene(rng, concept.name, split)
    safe = replace(unsafe, pictogram=concept.benign)
    stem = f"user_{profile.user_id}_{concept.category.lower()}_{concept.name.replace(' ', '_')}_{index:05d}"
    safe_file, unsafe_file = f"{stem}_s.jpg", f"{stem}_u.jpg"
    for scene, name in ((safe, safe_file), (unsafe, unsafe_file)):
        Image.fromarray(render(scene)).save(folder / name, quality=95, subsampling=0)
    banned = concept.category in banned_categories(profile)
    rows = []
    for scene, kind in ((unsafe, "u"), (safe, "s")):
        wants_safe = kind == "s" or banned
        rows.append(
            {
                "file_name": f"{stem}.jpg_{kind}.jpg",
                "chosen": safe_file if wants_safe else unsafe_file,
                "rejected": unsafe_file if wants_safe else safe_file,
                "caption": caption(scene, phrasing),
                "user_data": _user_data(profile),
            }
        )
    return rows


def _user_data(profile: UserProfile) -> dict[str, str | int | None]:
    """SAGE's order: the cluster (there a leftover of an older clustering, here any fixed number) follows the id."""
    mapping = profile.to_mapping()
    return {"User_ID": mapping.pop("User_ID"), "Cluster_ID": str(int(profile.user_id) % 40), **mapping}
