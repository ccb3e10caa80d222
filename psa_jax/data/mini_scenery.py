"""The scenery of SAGE-mini: 8 subjects and 6 backgrounds, drawn with Pillow at 4x and scaled down."""

from collections.abc import Callable

from PIL import Image, ImageFilter

from psa_jax.data.mini_glyphs import EDGE, SUPERSAMPLE, Pen

SUBJECT_SIZE = 28
PICTURE_SIZE = 64
SUBJECT_COLOURS = ((225, 60, 50), (50, 110, 225), (250, 190, 40), (150, 80, 200), (60, 170, 90), (240, 130, 170))

# --- subjects: one colour each, dark details, a dark outline so that they stand out on every background

WINDOW = (255, 240, 170, 255)
DARK = (*EDGE, 255)
WHITE = (250, 250, 250, 255)


def house(pen: Pen) -> None:
    pen.box(16, 46, 84, 94)
    pen.polygon([(50, 8), (94, 48), (6, 48)], DARK)
    pen.box(42, 64, 60, 94, DARK)
    pen.box(66, 56, 78, 70, WINDOW)
    pen.box(22, 56, 34, 70, WINDOW)


def tree(pen: Pen) -> None:
    pen.box(42, 60, 58, 95, (110, 70, 40, 255))
    pen.disc(50, 28, 23)
    pen.disc(30, 48, 22)
    pen.disc(70, 48, 22)


def car(pen: Pen) -> None:
    pen.polygon([(24, 54), (36, 28), (70, 28), (84, 54)])
    pen.box(4, 50, 96, 78, rounding=8)
    pen.polygon([(34, 50), (41, 35), (51, 35), (51, 50)], WINDOW)
    pen.polygon([(57, 50), (57, 35), (66, 35), (74, 50)], WINDOW)
    for x in (26, 74):
        pen.disc(x, 78, 15, DARK)
        pen.disc(x, 78, 6, WHITE)


def boat(pen: Pen) -> None:
    pen.polygon([(4, 66), (96, 66), (80, 94), (20, 94)])
    pen.box(46, 6, 53, 66, DARK)
    pen.polygon([(55, 8), (90, 58), (55, 58)], WHITE)
    pen.polygon([(44, 18), (44, 58), (16, 58)], WHITE)


def cat(pen: Pen) -> None:
    pen.stroke([(74, 84), (92, 76), (90, 52)], 10)
    pen.oval(48, 76, 30, 19)
    pen.disc(44, 38, 27)
    pen.polygon([(18, 34), (20, 4), (42, 16)])
    pen.polygon([(70, 34), (68, 4), (46, 16)])
    for x in (34, 54):
        pen.disc(x, 36, 6, WHITE)
        pen.disc(x, 37, 3.5, DARK)
    pen.polygon([(39, 48), (49, 48), (44, 55)], DARK)


def robot(pen: Pen) -> None:
    pen.box(47, 2, 53, 14, DARK)
    pen.box(24, 10, 76, 46, rounding=6)
    pen.box(16, 50, 84, 80)
    pen.box(4, 52, 12, 76, DARK)
    pen.box(88, 52, 96, 76, DARK)
    pen.box(26, 80, 42, 96, DARK)
    pen.box(58, 80, 74, 96, DARK)
    for x in (38, 62):
        pen.disc(x, 28, 8, WINDOW)
    pen.box(34, 58, 66, 70, WHITE)


def mushroom(pen: Pen) -> None:
    pen.box(36, 48, 64, 95, (245, 225, 190, 255), rounding=8)
    pen.pie(50, 54, 45, 180, 360)
    for x, y in ((28, 40), (52, 24), (72, 42)):
        pen.disc(x, y, 8, WHITE)


def rocket(pen: Pen) -> None:
    pen.polygon([(34, 54), (12, 84), (34, 82)], DARK)
    pen.polygon([(66, 54), (88, 84), (66, 82)], DARK)
    pen.polygon([(38, 82), (62, 82), (50, 98)], (255, 150, 30, 255))
    pen.oval(50, 44, 21, 42)
    pen.box(32, 50, 68, 82)
    pen.disc(50, 38, 10, WINDOW)


SUBJECT_DRAWERS: dict[str, Callable[[Pen], None]] = {
    drawer.__name__: drawer for drawer in (house, tree, car, boat, cat, robot, mushroom, rocket)
}


def subject_sprite(name: str, colour: tuple[int, int, int]) -> Image.Image:
    """A subject in its colour with a dark outline: RGBA, 28 x 28."""
    size = SUBJECT_SIZE * SUPERSAMPLE
    margin = SUPERSAMPLE
    body = Image.new("RGBA", (size - 2 * margin,) * 2, (*EDGE, 0))
    SUBJECT_DRAWERS[name](Pen(body, (*colour, 255)))
    sprite = Image.new("RGBA", (size, size), (*EDGE, 0))
    sprite.paste(body, (margin, margin))
    outline = sprite.getchannel("A").filter(ImageFilter.MaxFilter(2 * margin - 1))
    framed = Image.new("RGBA", (size, size), (*EDGE, 0))
    framed.putalpha(outline)
    return Image.alpha_composite(framed, sprite).reduce(SUPERSAMPLE)


# --- backgrounds: calm areas of colour; `variant` shifts the horizon, the stars or the bricks

VARIANTS = 4


def meadow(pen: Pen, variant: int) -> None:
    pen.box(0, 0, 100, 100, (135, 200, 240))
    pen.oval(20, 112, 90, 62 + 3 * variant, (95, 175, 80))
    pen.oval(90, 118, 80, 58, (75, 155, 70))


def beach(pen: Pen, variant: int) -> None:
    top = 30 + 3 * variant
    pen.box(0, 0, 100, 100, (190, 225, 245))
    pen.box(0, top, 100, 100, (40, 130, 190))
    pen.box(0, top + 28, 100, 100, (235, 210, 150))


def night(pen: Pen, variant: int) -> None:
    pen.box(0, 0, 100, 100, (25, 30, 75))
    for x, y in ((12, 12), (36, 24), (58, 8), (84, 20), (70, 40), (22, 44), (92, 52), (48, 52)):
        pen.disc((x + 23 * variant) % 100, y, 1.8, (240, 240, 200))
    pen.oval(30 + 10 * variant, 118, 90, 50, (20, 20, 40))


def brick_wall(pen: Pen, variant: int) -> None:
    pen.box(0, 0, 100, 100, (150, 100, 85))
    for row in range(9):
        top = row * 12.5 - 3.125 * variant
        for column in range(-1, 5):
            left = column * 25 + (12.5 if row % 2 else 0)
            pen.box(left + 1.6, top + 1.6, left + 24, top + 11.5, (185, 95, 70))


def snow(pen: Pen, variant: int) -> None:
    pen.box(0, 0, 100, 100, (170, 185, 205))
    for x, y in ((10, 14), (30, 34), (46, 10), (66, 26), (86, 12), (90, 44), (54, 48), (14, 50)):
        pen.disc((x + 23 * variant) % 100, y, 2.6, (245, 250, 255))
    pen.oval(30, 118, 110, 60 - 2 * variant, (240, 245, 250))
    pen.box(0, 78, 100, 100, (240, 245, 250))


def room(pen: Pen, variant: int) -> None:
    floor = 66 + 3 * variant
    pen.box(0, 0, 100, 100, (225, 190, 150))
    for x in range(6, 100, 25):
        pen.box(x, 0, x + 10, 100, (215, 175, 135))
    pen.box(0, floor, 100, 100, (130, 85, 55))
    pen.box(0, floor - 4, 100, floor, (245, 235, 220))


BACKGROUND_DRAWERS: dict[str, Callable[[Pen, int], None]] = {
    drawer.__name__.replace("_", " "): drawer for drawer in (meadow, beach, night, brick_wall, snow, room)
}


def background_picture(name: str, variant: int) -> Image.Image:
    """One background without its random tint: RGB, 64 x 64."""
    size = PICTURE_SIZE * SUPERSAMPLE
    image = Image.new("RGB", (size, size))
    BACKGROUND_DRAWERS[name](Pen(image), variant)
    return image.reduce(SUPERSAMPLE)
