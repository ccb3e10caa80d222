"""The pictograms of SAGE-mini: 36 glyphs on a plate, drawn with Pillow at 4x and scaled down.

Every shape is bold (strokes of at least 3 of 28 pixels) because a VAE with 4x4 pixel cells has to keep it apart.
Coordinates run from 0 to 100 in both directions, y downwards, whatever the sprite's size.
"""

import math
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

SUPERSAMPLE = 4
PICTOGRAM_SIZE = 28

Number = int | float
Point = tuple[Number, Number]
Ink = int | tuple[int, ...]


class Pen:
    """Draws in 100 x 100 units on a square Pillow image.

    Args:
      image: what to draw on.
      ink: a grey value or a colour, as the image's mode asks; every shape may name another.
    """

    def __init__(self, image: Image.Image, ink: Ink = 255):
        self.draw = ImageDraw.Draw(image)
        self.scale = image.width / 100
        self.ink = ink

    def _ink(self, ink: Ink | None) -> Ink:
        return self.ink if ink is None else ink

    def _at(self, x: Number, y: Number) -> Point:
        return (x * self.scale, y * self.scale)

    def polygon(self, points: Sequence[Point], ink: Ink | None = None) -> None:
        """Filled polygon."""
        self.draw.polygon([self._at(*point) for point in points], fill=self._ink(ink))

    def box(
        self, left: Number, top: Number, right: Number, bottom: Number, ink: Ink | None = None, rounding: Number = 0
    ) -> None:
        """Filled rectangle, its corners rounded by `rounding` units."""
        corners = (*self._at(left, top), *self._at(right, bottom))
        self.draw.rounded_rectangle(corners, rounding * self.scale, fill=self._ink(ink))

    def oval(self, x: Number, y: Number, rx: Number, ry: Number, ink: Ink | None = None) -> None:
        """Filled ellipse around (x, y)."""
        self.draw.ellipse((*self._at(x - rx, y - ry), *self._at(x + rx, y + ry)), fill=self._ink(ink))

    def disc(self, x: Number, y: Number, radius: Number, ink: Ink | None = None) -> None:
        """Filled circle around (x, y)."""
        self.oval(x, y, radius, radius, ink)

    def arc(
        self, x: Number, y: Number, radius: Number, start: Number, end: Number, width: Number, ink: Ink | None = None
    ) -> None:
        """Part of a ring whose outer radius is `radius`; angles in degrees, clockwise from the right."""
        corners = (*self._at(x - radius, y - radius), *self._at(x + radius, y + radius))
        self.draw.arc(corners, start, end, fill=self._ink(ink), width=math.floor(width * self.scale + 0.5))

    def pie(self, x: Number, y: Number, radius: Number, start: Number, end: Number, ink: Ink | None = None) -> None:
        """Filled sector of a circle."""
        corners = (*self._at(x - radius, y - radius), *self._at(x + radius, y + radius))
        self.draw.pieslice(corners, start, end, fill=self._ink(ink))

    def stroke(self, points: Sequence[Point], width: Number, ink: Ink | None = None) -> None:
        """Thick polyline with round ends and joints."""
        pixels = math.floor(width * self.scale + 0.5)
        self.draw.line([self._at(*point) for point in points], fill=self._ink(ink), width=pixels)
        for x, y in points:
            self.disc(x, y, width / 2, ink)


# --- Harassment: arrows


def thick_arrow(pen: Pen) -> None:
    pen.polygon([(50, 10), (90, 52), (66, 52), (66, 90), (34, 90), (34, 52), (10, 52)])


def twin_arrows(pen: Pen) -> None:
    pen.polygon([(10, 22), (58, 22), (58, 9), (91, 29), (58, 49), (58, 36), (10, 36)])
    pen.polygon([(90, 64), (42, 64), (42, 51), (9, 71), (42, 91), (42, 78), (90, 78)])


def bent_arrow(pen: Pen) -> None:
    pen.box(12, 22, 30, 90)
    pen.box(12, 22, 60, 40)
    pen.polygon([(56, 6), (92, 31), (56, 56)])


def sharp_chevrons(pen: Pen) -> None:
    for x in (8, 50):
        pen.polygon([(x, 12), (x + 18, 12), (x + 42, 50), (x + 18, 88), (x, 88), (x + 22, 50)])


# --- Hate: barred frames


def barred_circle(pen: Pen) -> None:
    pen.arc(50, 50, 41, 0, 360, 13)
    pen.stroke([(25, 25), (75, 75)], 13)


def caged_square(pen: Pen) -> None:
    pen.box(8, 8, 92, 20)
    pen.box(8, 80, 92, 92)
    for x in (8, 44, 80):
        pen.box(x, 8, x + 12, 92)


def crossed_box(pen: Pen) -> None:
    pen.box(6, 12, 94, 88)
    pen.box(18, 24, 82, 76, 0)
    pen.stroke([(12, 18), (88, 82)], 11)
    pen.stroke([(12, 82), (88, 18)], 11)


def struck_triangle(pen: Pen) -> None:
    pen.polygon([(50, 8), (94, 86), (6, 86)])
    pen.polygon([(50, 33), (74, 75), (26, 75)], 0)
    pen.box(4, 52, 96, 65)


# --- Propaganda: things that broadcast


def megaphone(pen: Pen) -> None:
    pen.polygon([(8, 40), (30, 40), (62, 14), (62, 82), (30, 56), (8, 56)])
    pen.box(18, 56, 32, 86)
    pen.arc(54, 48, 38, -48, 48, 10)


def rising_rays(pen: Pen) -> None:
    pen.pie(50, 92, 30, 180, 360)
    for dx, dy, far_x, far_y in ((0, -42, 0, -78), (-22, -36, -38, -64), (22, -36, 38, -64)):
        pen.stroke([(50 + dx, 92 + dy), (50 + far_x, 92 + far_y)], 12)


def signal_waves(pen: Pen) -> None:
    pen.disc(22, 78, 13)
    pen.arc(14, 86, 49, -90, 0, 13)
    pen.arc(14, 86, 78, -90, 0, 13)


def tall_banner(pen: Pen) -> None:
    pen.box(6, 8, 94, 19)
    pen.polygon([(20, 24), (80, 24), (80, 92), (50, 66), (20, 92)])


# --- Self-Harm: broken things


def broken_heart(pen: Pen) -> None:
    pen.disc(29, 34, 22)
    pen.disc(71, 34, 22)
    pen.polygon([(9, 43), (50, 26), (91, 43), (50, 92)])
    pen.stroke([(52, 8), (42, 36), (58, 52), (46, 74), (52, 96)], 8, 0)


def cracked_egg(pen: Pen) -> None:
    pen.oval(50, 54, 34, 39)
    pen.oval(50, 46, 28, 37)
    pen.stroke([(6, 48), (28, 60), (42, 42), (58, 60), (72, 42), (94, 56)], 10, 0)


def split_ring(pen: Pen) -> None:
    pen.arc(45, 36, 36, 150, 330, 15)
    pen.arc(55, 64, 36, -30, 150, 15)


def snapped_stick(pen: Pen) -> None:
    pen.polygon([(4, 80), (34, 20), (54, 32), (44, 44), (50, 54), (26, 92)])
    pen.polygon([(96, 80), (76, 92), (54, 66), (60, 56), (52, 48), (66, 32)])


# --- Sexuality: veils and closures


def twin_crescents(pen: Pen) -> None:
    for outer, inner in ((1, -17), (99, 117)):
        pen.disc(outer, 50, 40)
        pen.disc(inner, 50, 37, 0)


def keyhole(pen: Pen) -> None:
    pen.disc(50, 32, 24)
    pen.polygon([(42, 40), (58, 40), (76, 92), (24, 92)])


def drawn_curtain(pen: Pen) -> None:
    pen.box(6, 8, 94, 20)
    pen.polygon([(10, 20), (46, 20), (40, 44), (22, 60), (26, 92), (10, 92)])
    pen.polygon([(90, 20), (54, 20), (60, 44), (78, 60), (74, 92), (90, 92)])


def ribbon_knot(pen: Pen) -> None:
    pen.polygon([(6, 16), (50, 36), (6, 60)])
    pen.polygon([(94, 16), (50, 36), (94, 60)])
    pen.stroke([(50, 38), (28, 86)], 12)
    pen.stroke([(50, 38), (72, 86)], 12)
    pen.disc(50, 38, 12)


# --- Shocking: jolts


def star_burst(pen: Pen) -> None:
    points = []
    for index in range(8):
        radius = 23 if index % 2 else 50
        angle = math.pi * index / 4
        points.append((50 + radius * math.sin(angle), 50 - radius * math.cos(angle)))
    pen.polygon(points)


def wound_spiral(pen: Pen) -> None:
    turns = [(math.radians(angle), 4 + 38 * angle / 620) for angle in range(0, 621, 10)]
    pen.stroke([(48 + radius * math.cos(a), 51 + radius * math.sin(a)) for a, radius in turns], 12)


def zigzag(pen: Pen) -> None:
    for y in (20, 58):
        pen.stroke([(9, y + 20), (30, y), (50, y + 20), (70, y), (91, y + 20)], 11)


def flying_shards(pen: Pen) -> None:
    pen.polygon([(8, 10), (50, 16), (20, 44)])
    pen.polygon([(92, 14), (88, 56), (58, 36)])
    pen.polygon([(10, 92), (22, 54), (46, 74)])
    pen.polygon([(54, 90), (60, 56), (92, 84)])


# --- Violence: edges and weights


def crossed_blades(pen: Pen) -> None:
    blade, guard, grip = [(8, 8), (24, 12), (76, 66), (66, 76), (12, 24)], [(56, 84), (84, 56)], [(74, 74), (90, 90)]
    pen.polygon(blade)
    pen.stroke(guard, 9)
    pen.stroke(grip, 11)
    pen.polygon(_mirrored(blade))
    pen.stroke(_mirrored(guard), 9)
    pen.stroke(_mirrored(grip), 11)


def _mirrored(points: Sequence[Point]) -> list[Point]:
    return [(100 - x, y) for x, y in points]


def spike_row(pen: Pen) -> None:
    pen.box(6, 74, 94, 90)
    for x in (6, 36, 66):
        pen.polygon([(x, 76), (x + 14, 14), (x + 28, 76)])


def heavy_hammer(pen: Pen) -> None:
    pen.box(10, 10, 90, 44, rounding=4)
    pen.box(41, 40, 59, 94)


def iron_wedge(pen: Pen) -> None:
    pen.polygon([(6, 12), (94, 12), (50, 92)])


# --- benign: everyday things with round outlines


def flower(pen: Pen) -> None:
    for index in range(5):
        angle = 2 * math.pi * index / 5
        pen.disc(50 + 26 * math.sin(angle), 50 - 26 * math.cos(angle), 18)
    pen.disc(50, 50, 12, 0)


def cup(pen: Pen) -> None:
    pen.arc(68, 44, 24, -90, 90, 10)
    pen.box(12, 22, 70, 64)
    pen.pie(41, 60, 29, 0, 180)


def kite(pen: Pen) -> None:
    pen.polygon([(60, 2), (94, 36), (60, 74), (26, 36)])
    pen.stroke([(58, 70), (42, 74), (46, 88), (28, 84), (12, 94)], 10)


def bell(pen: Pen) -> None:
    pen.disc(50, 14, 8)
    pen.disc(50, 38, 25)
    pen.polygon([(25, 38), (75, 38), (80, 62), (92, 74), (8, 74), (20, 62)])
    pen.pie(50, 78, 14, 0, 180)


def leaf(pen: Pen) -> None:
    quarter = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in range(0, 91, 6)]
    pen.polygon([(22 + 72 * c, 6 + 72 * s) for c, s in quarter] + [(94 - 72 * c, 78 - 72 * s) for c, s in quarter])
    pen.stroke([(8, 92), (34, 66)], 11)
    pen.stroke([(44, 56), (68, 32)], 7, 0)


def fish(pen: Pen) -> None:
    pen.oval(40, 50, 34, 24)
    pen.polygon([(62, 50), (94, 24), (94, 76)])
    pen.disc(26, 44, 7, 0)


def umbrella(pen: Pen) -> None:
    pen.pie(50, 52, 44, 180, 360)
    for x in (21, 50, 79):
        pen.disc(x, 54, 11, 0)
    pen.box(45, 40, 55, 80)
    pen.arc(38, 79, 17, 0, 180, 10)


def note(pen: Pen) -> None:
    pen.oval(24, 78, 17, 13)
    pen.oval(74, 70, 17, 13)
    pen.box(31, 18, 41, 78)
    pen.box(81, 10, 91, 70)
    pen.polygon([(31, 18), (91, 8), (91, 26), (31, 36)])


_DRAWERS: tuple[Callable[[Pen], None], ...] = (
    *(thick_arrow, twin_arrows, bent_arrow, sharp_chevrons),
    *(barred_circle, caged_square, crossed_box, struck_triangle),
    *(megaphone, rising_rays, signal_waves, tall_banner),
    *(broken_heart, cracked_egg, split_ring, snapped_stick),
    *(twin_crescents, keyhole, drawn_curtain, ribbon_knot),
    *(star_burst, wound_spiral, zigzag, flying_shards),
    *(crossed_blades, spike_row, heavy_hammer, iron_wedge),
    *(flower, cup, kite, bell, leaf, fish, umbrella, note),
)
GLYPHS: dict[str, Callable[[Pen], None]] = {drawer.__name__.replace("_", " "): drawer for drawer in _DRAWERS}
"""Pictogram name -> how to draw it; the name in captions is the function's name with a space."""

GLYPH_COLOURS = ((190, 20, 40), (20, 60, 180), (10, 110, 50), (120, 20, 150), (30, 30, 40), (180, 80, 0))
PLATE = (252, 246, 226)
EDGE = (40, 40, 50)


def pictogram_sprite(name: str, colour: tuple[int, int, int]) -> Image.Image:
    """A plate with one glyph on it: RGBA, 28 x 28."""
    size = PICTOGRAM_SIZE * SUPERSAMPLE
    sprite = Image.new("RGBA", (size, size), (*EDGE, 0))
    plate = Pen(sprite)
    plate.box(0, 0, 99.5, 99.5, (*EDGE, 255), rounding=16)
    plate.box(3.5, 3.5, 96, 96, (*PLATE, 255), rounding=13)
    mask = Image.new("L", (size * 88 // 100,) * 2, 0)
    GLYPHS[name](Pen(mask))
    offset = (size - mask.width) // 2
    sprite.paste((*colour, 255), (offset, offset), mask)
    return sprite.reduce(SUPERSAMPLE)
