"""The pictograms of SAGE-mini: 7 x 7 cells each, abstract and inoffensive. A category is a group of shapes.

Any two differ in at least ten of their 49 cells. A cell has 4 x 4 pixels.
"""

import numpy as np
from jaxtyping import UInt8
from PIL import Image

CELL = 4
"""Side of a cell, in pixels; everything in SAGE-mini lies on this grid."""

Colour = tuple[int, int, int]
GLYPH_COLOURS: tuple[Colour, ...] = (
    (190, 20, 40),
    (20, 60, 180),
    (10, 110, 50),
    (120, 20, 150),
    (30, 30, 40),
    (180, 80, 0),
)
PLATE: Colour = (252, 246, 226)

_BITMAPS = """
thick arrow    | twin arrows    | bent arrow     | sharp chevrons
...#...        | ..#....        | ....#..        | #..#...
..###..        | .#.....        | ....##.        | .#..#..
.#####.        | #######        | #######        | ..#..#.
#######        | .......        | #...##.        | ...#..#
..###..        | #######        | #...#..        | ..#..#.
..###..        | .....#.        | #......        | .#..#..
..###..        | ....#..        | #......        | #..#...

barred circle  | caged square   | crossed box    | struck triangle
..###..        | #######        | #######        | ...#...
.#...##        | #..#..#        | ##...##        | ..#.#..
#...#.#        | #..#..#        | #.#.#.#        | ..#.#..
#..#..#        | #..#..#        | #..#..#        | #######
#.#...#        | #..#..#        | #.#.#.#        | .#...#.
##...#.        | #..#..#        | ##...##        | #.....#
..###..        | #######        | #######        | #######

megaphone      | rising rays    | signal waves   | tall banner
.....##        | #..#..#        | ####...        | #######
...####        | .#.#.#.        | ....#..        | .#####.
.######        | .......        | ###..#.        | .#####.
#######        | ..###..        | ...#..#        | .#####.
.######        | .#####.        | ##..#.#        | .#####.
...####        | #######        | ..#.#.#        | .##.##.
.....##        | #######        | #.#.#.#        | .#...#.

broken heart   | cracked egg    | split ring     | snapped stick
.##.##.        | ..###..        | .###.#.        | ##.....
###.###        | .#####.        | #.....#        | ###....
##.####        | #.#.#.#        | #.....#        | .###...
###.###        | .#.#.#.        | .......        | ..#..#.
.#.###.        | #######        | #.....#        | ....###
..#.#..        | .#####.        | #.....#        | .....##
...#...        | ..###..        | .#.###.        | .....##

twin crescents | keyhole        | drawn curtain  | ribbon knot
##...##        | ..###..        | #######        | #.....#
..#.#..        | .#####.        | ###.###        | ##...##
..###..        | .#####.        | ##...##        | #######
..#.#..        | ..###..        | ##...##        | ##.#.##
..###..        | ..###..        | #.....#        | #..#..#
..#.#..        | .#####.        | ##...##        | ..#.#..
##...##        | .#####.        | ##...##        | .#...#.

star burst     | wound spiral   | zigzag         | flying shards
#..#..#        | #######        | .......        | ##...##
.#.#.#.        | ......#        | .#...#.        | ##....#
..###..        | #####.#        | #.#.#.#        | .......
#######        | #...#.#        | ...#...        | ...##..
..###..        | #.###.#        | .#...#.        | ...#...
.#.#.#.        | #.....#        | #.#.#.#        | #.....#
#..#..#        | #######        | ...#...        | ##...##

crossed blades | spike row      | heavy hammer   | iron wedge
#.....#        | .......        | #######        | #######
.#...#.        | #..#..#        | #######        | ######.
..#.#..        | #..#..#        | #######        | #####..
...#...        | ##.#.##        | ...#...        | ####...
##.#.##        | #######        | ...#...        | ###....
.##.##.        | #######        | ...#...        | ##.....
#.#.#.#        | #######        | ...#...        | #......

flower         | cup            | kite           | bell
..###..        | .......        | ...###.        | ...#...
.##.##.        | #####..        | ..#####        | ..###..
###.###        | #######        | ..#####        | ..###..
#.....#        | ####..#        | ...###.        | .#####.
###.###        | #######        | ...##..        | .#####.
.##.##.        | #####..        | ..#....        | #######
..###..        | .###...        | ##.....        | ...#...

leaf           | fish           | umbrella       | note
....###        | .......        | ..###..        | ..#####
..#####        | .###..#        | .#####.        | ..#...#
.###.##        | ##.####        | #######        | ..#...#
.##.##.        | #######        | #.#.#.#        | ..#...#
##.###.        | #######        | ...#...        | ###.###
.###...        | .###..#        | ...#.#.        | ###.###
#......        | .......        | ...##..        | .......
"""


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """Parses bitmaps that stand side by side under their names.

    Returns:
      Name → seven rows of seven letters.
    """
    bitmaps = {}
    for block in text.strip("\n").split("\n\n"):
        columns = zip(*([part.strip() for part in line.split("|")] for line in block.splitlines()), strict=True)
        bitmaps |= {name: tuple(rows) for name, *rows in columns}
    return bitmaps


GLYPHS = parse(_BITMAPS)
"""Pictogram name → its cells, `#` glyph and `.` plate."""


def sprite(bitmap: tuple[str, ...], colours: dict[str, Colour]) -> Image.Image:
    """Renders a bitmap as RGBA, with CELL x CELL pixels for each letter.

    Args:
      bitmap: rows of letters.
      colours: letter → colour; other letters are transparent.
    """
    cells: UInt8[np.ndarray, "7 7 4"] = np.zeros((len(bitmap), len(bitmap[0]), 4), np.uint8)
    for y, row in enumerate(bitmap):
        for x, letter in enumerate(row):
            if letter in colours:
                cells[y, x] = (*colours[letter], 255)
    return Image.fromarray(cells.repeat(CELL, axis=0).repeat(CELL, axis=1), "RGBA")


def pictogram_sprite(name: str, colour: Colour) -> Image.Image:
    """Renders a pictogram: one glyph on a plate, RGBA, 28 x 28.

    Args:
      name: key of GLYPHS.
      colour: of the glyph.
    """
    return sprite(GLYPHS[name], {"#": colour, ".": PLATE})
