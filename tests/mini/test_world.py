"""The small world: its tables and its pictures."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from psa_jax.errors import PSAError
from psa_jax.mini import world
from psa_jax.mini.captions import Prompt, caption
from psa_jax.mini.glyphs import GLYPH_COLOURS, GLYPHS, pictogram_sprite
from psa_jax.profiles.schema import CATEGORIES


def test_seven_categories_of_four_concepts_with_four_different_counterparts():
    assert Counter(concept.category for concept in world.CONCEPTS) == dict.fromkeys(CATEGORIES, 4)
    for category in CATEGORIES:
        assert len({concept.benign for concept in world.CONCEPTS if concept.category == category}) == 4
    served = Counter(concept.benign for concept in world.CONCEPTS)
    assert set(served) == set(world.BENIGN) and set(served.values()) <= {3, 4}
    held_out = [concept.category for concept in world.CONCEPTS if concept.name in world.HELD_OUT_CONCEPTS]
    assert sorted(held_out) == sorted(CATEGORIES)  # one of each
    assert list(world.PICTOGRAMS) == list(GLYPHS) and len(set(world.PICTOGRAMS)) == 36


def test_no_name_is_part_of_another_thing_a_caption_may_say():
    names = [*world.PICTOGRAMS, *world.SUBJECTS, *world.BACKGROUNDS]
    words = [set(name.split()) for name in names]
    assert all(not a <= b and not b <= a for a, b in combinations(words, 2))


def test_pictograms_stay_apart_when_blurred_to_cells_of_the_tiny_vae():
    cells = []
    for name in world.PICTOGRAMS:
        sprite = pictogram_sprite(name, GLYPH_COLOURS[4]).convert("L")
        cells.append(np.asarray(sprite.resize((7, 7), Image.Resampling.BOX), np.float64))
    worst = min(float(np.sqrt(np.mean((a - b) ** 2))) for a, b in combinations(cells, 2))
    assert worst > 30  # grey levels of 255, all 49 cells; noise of one level is 1


def test_scenes_that_differ_in_the_pictogram_differ_in_one_plate_above_the_subject():
    for seed in range(20):
        scene = world.Scene("night", "car", "keyhole", seed)
        picture = world.render(scene)
        other = world.render(world.Scene("night", "car", "kite", seed))
        without = world.render(world.Scene("night", "car", None, seed))
        assert np.array_equal(picture, world.render(scene))
        rows, columns = np.nonzero(np.any(picture != without, axis=-1))
        assert rows.max() < 32 and np.ptp(rows) == 27 and np.ptp(columns) == 27
        inside = np.zeros((64, 64), bool)
        inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        changed = np.any(picture != other, axis=-1)
        assert changed.any() and not changed[~inside].any()
        rows, columns = np.nonzero(np.any(without != world.render(world.Scene("night", "boat", None, seed)), axis=-1))
        assert rows.min() >= 32


def test_colour_says_nothing_about_the_pictogram():
    colours = set()
    for seed in range(30):
        used = set()
        for name in world.PICTOGRAMS:
            pixels = world.render(world.Scene("room", "tree", name, seed))[:32].reshape(-1, 3)
            counts = {colour: int(np.all(pixels == colour, axis=-1).sum()) for colour in GLYPH_COLOURS}
            used.add(max(counts, key=counts.__getitem__))
            assert max(counts.values()) > 40
        assert len(used) == 1
        colours |= used
    assert colours == set(GLYPH_COLOURS)


def test_positions_tints_and_colours_vary_with_the_seed():
    pictures = {world.render(world.Scene("beach", "house", "cup", seed)).tobytes() for seed in range(50)}
    assert len(pictures) == 50


@pytest.mark.parametrize("field", ["background", "subject", "pictogram"])
def test_unknown_parts_of_a_scene_are_refused(field: str):
    parts = {"background": "snow", "subject": "cat", "pictogram": "leaf", "seed": 1} | {field: "dragon"}
    with pytest.raises(PSAError, match=f"unknown {field} 'dragon'"):
        world.render(world.Scene(**parts))
    with pytest.raises(PSAError, match=f"unknown {field} 'dragon'"):
        caption(Prompt(world.Scene(**parts), 0))


def test_a_companion_is_on_the_other_side_and_changes_nothing_else():
    sides = Counter()
    for seed in range(20):
        alone = world.Scene("night", "car", "keyhole", seed)
        both = world.Scene("night", "car", "keyhole", seed, "kite")
        rows, columns = np.nonzero(np.any(world.render(alone) != world.render(both), axis=-1))
        assert rows.max() < 32 and np.ptp(rows) == 27 and np.ptp(columns) == 27
        left = bool(columns.max() < 32)
        assert left or columns.min() >= 32
        names = [world.PICTOGRAMS[index] for index in world.labels_of(both)[:2]]
        assert names == (["kite", "keyhole"] if left else ["keyhole", "kite"])
        shown = world.labels_of(alone)
        assert {shown.left, shown.right} == {world.PICTOGRAMS.index("keyhole"), world.NO_PICTOGRAM}
        assert (shown.left == world.NO_PICTOGRAM) == left
        sides[left] += 1
    assert min(sides.values()) > 3
    with pytest.raises(PSAError, match="companion 'kite' and no pictogram"):
        world.render(world.Scene("night", "car", None, 0, "kite"))
    with pytest.raises(PSAError, match="unknown companion 'dragon'"):
        world.render(world.Scene("night", "car", "kite", 0, "dragon"))
