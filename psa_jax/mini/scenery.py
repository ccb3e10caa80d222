"""Subjects and backgrounds of SAGE-mini, on the same grid of cells as its pictograms."""

import numpy as np
from PIL import Image

from psa_jax.mini.glyphs import CELL, Colour, parse, sprite

PICTURE_SIZE = 64
GRID = PICTURE_SIZE // CELL
SUBJECT_COLOURS: tuple[Colour, ...] = (
    (225, 60, 50),
    (50, 110, 225),
    (250, 190, 40),
    (150, 80, 200),
    (60, 170, 90),
    (240, 130, 170),
)
_DARK, _LIGHT = (45, 40, 50), (255, 246, 214)

_BITMAPS = """
house          | tree           | car            | boat
...d...        | ..###..        | .......        | ...d...
..ddd..        | .#####.        | .####..        | ..wd...
.ddddd.        | #######        | .#ww##.        | .wwd#..
#######        | #######        | #######        | wwwd##.
#w##w##        | .#####.        | #######        | ...d...
####d##        | ...d...        | .d...d.        | #######
####d##        | ...d...        | .......        | .#####.

cat            | robot          | mushroom       | rocket
#...#..        | ...w...        | ..###..        | ...#...
#####..        | .#####.        | .#w###.        | ..###..
#d#d#.#        | .#d#d#.        | ####w##        | ..#w#..
#####.#        | .#####.        | ##w####        | ..###..
.######        | d#####d        | ...ww..        | .d###d.
.#####.        | .#www#.        | ...ww..        | dd###dd
.#.#.#.        | .##.##.        | ...ww..        | ...w...
"""

SUBJECTS = parse(_BITMAPS)
"""Subject name → its cells: `#` the subject's colour, `d` dark, `w` light, `.` the background."""


def subject_sprite(name: str, colour: Colour) -> Image.Image:
    """Renders a subject: RGBA, 28 x 28.

    Args:
      name: key of SUBJECTS.
      colour: of its main part.
    """
    return sprite(SUBJECTS[name], {"#": colour, "d": _DARK, "w": _LIGHT})


VARIANTS = 4


def _bands(*bands: tuple[int, Colour]) -> np.ndarray:
    """Rows of cells: each band is (first row, colour)."""
    cells = np.zeros((GRID, GRID, 3), np.uint8)
    for top, colour in bands:
        cells[top:] = colour
    return cells


def _meadow(variant: int) -> np.ndarray:
    cells = _bands((0, (135, 200, 240)), (9, (95, 175, 80)))
    left = 4 * variant
    cells[8, left : left + 6] = (95, 175, 80)  # a hill
    return cells


def _beach(variant: int) -> np.ndarray:
    return _bands((0, (190, 225, 245)), (6 + variant % 2, (40, 130, 190)), (10, (235, 210, 150)))


def _dotted(cells: np.ndarray, rows: int, colour: Colour, variant: int) -> np.ndarray:
    for x, y in ((1, 1), (5, 3), (9, 1), (13, 2), (3, 6), (11, 5), (7, 7), (15, 7)):
        if y < rows:
            cells[y, (x + 4 * variant) % GRID] = colour
    return cells


def _night(variant: int) -> np.ndarray:
    return _dotted(_bands((0, (25, 30, 75)), (11, (20, 20, 40))), 8, (240, 240, 200), variant)


def _snow(variant: int) -> np.ndarray:
    return _dotted(_bands((0, (150, 170, 200)), (9, (240, 245, 250))), 8, (245, 250, 255), variant)


def _brick_wall(variant: int) -> np.ndarray:
    cells = _bands((0, (185, 95, 70)))
    for y in range(GRID):
        if y % 4 == variant:
            cells[y] = (150, 75, 60)
    return cells


def _room(variant: int) -> np.ndarray:
    cells = _bands((0, (225, 190, 150)), (11, (130, 85, 55)))
    cells[:11, variant::4] = (210, 170, 130)
    return cells


BACKGROUNDS = {
    "meadow": _meadow,
    "beach": _beach,
    "night": _night,
    "brick wall": _brick_wall,
    "snow": _snow,
    "room": _room,
}
"""Background name → cells [16, 16, 3] of one of its VARIANTS."""


def background_picture(name: str, variant: int) -> Image.Image:
    """Renders a background without its random tint: RGB, 64 x 64.

    Args:
      name: key of BACKGROUNDS.
      variant: from 0 to VARIANTS − 1.
    """
    return Image.fromarray(BACKGROUNDS[name](variant).repeat(CELL, axis=0).repeat(CELL, axis=1))
