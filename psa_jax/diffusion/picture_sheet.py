"""Pictures by prompt and user as one labelled picture: samples of a run, a figure for a README or a slide."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

_TEXT, _SOFT, _BACK = (28, 27, 26), (95, 91, 86), (255, 255, 255)
_BANNED, _ALLOWED, _NOBODY = (179, 68, 11), (15, 111, 134), (200, 196, 190)
_SIDE, _GAP, _FRAME, _LETTER, _LINE, _FONT = 230, 14, 4, 7, 16, 13
"""Pixels where a picture is `_UNIT` wide; with wider pictures all grow in proportion."""
_UNIT = 256


def scale_of(width: int) -> int:
    """Side of the square that a pixel of a picture becomes: small pictures are enlarged to 128 pixels or nearly so."""
    return max(1, 128 // width)


def picture_sheet(
    pictures: UInt8[np.ndarray, "n h w 3"],
    users: Sequence[str],
    prompts: Sequence[str],
    banned: Sequence[Sequence[bool | None]],
    corner: str = "",
    grey: str = "no user",
) -> Image.Image:
    """Makes the sheet: prompts on the left, users above; a frame's colour says whether the user bans the content.

    Args:
      pictures: bytes, RGB, row by row.
      users: headings of the columns.
      prompts: headings of the rows; what does not fit beside a picture is cut.
      banned: [row][column]: whether the user bans what the prompt asks for; None for a grey frame.
      corner: what to say in the corner, such as the step of a run.
      grey: what a grey frame means.
    """
    scale = scale_of(pictures.shape[2])
    height, width = (side * scale for side in pictures.shape[1:3])
    unit = max(1, width // _UNIT)
    side, gap, frame, line = (unit * length for length in (_SIDE, _GAP, _FRAME, _LINE))
    letters, columns = unit * _LETTER, len(users)
    headings = [textwrap.wrap(user, width // letters) for user in users]
    head = 4 * unit + line * max(map(len, headings)) + 2 * frame
    page = Image.new("RGB", (side + columns * (width + gap), head + len(prompts) * (height + gap) + 26 * unit), _BACK)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT * unit)

    def say(left: int, top: int, lines: list[str], colour: tuple[int, int, int] = _TEXT) -> None:
        for number, text in enumerate(lines):
            draw.text((left, top + number * line), text, colour, font)

    say(8 * unit, 4 * unit, [corner], _SOFT)
    for column, lines in enumerate(headings):
        say(side + column * (width + gap), 4 * unit, lines)
    for row, prompt in enumerate(prompts):
        top = head + row * (height + gap)
        room = max(1, height // line - 1)
        say(8 * unit, top + 4 * unit, textwrap.wrap(prompt, _SIDE // _LETTER - 3, max_lines=room, placeholder=" …"))
        for column in range(columns):
            left = side + column * (width + gap)
            colour = {None: _NOBODY, True: _BANNED, False: _ALLOWED}[banned[row][column]]
            draw.rectangle((left - frame, top - frame, left + width + frame - 1, top + height + frame - 1), colour)
            picture = Image.fromarray(np.asarray(pictures[row * columns + column]))
            page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
    left, top = side, page.height - 22 * unit
    for colour, words in ((_BANNED, "banned by this user's profile"), (_ALLOWED, "allowed"), (_NOBODY, grey)):
        draw.rectangle((left, top + 2 * unit, left + 12 * unit, top + 14 * unit), colour)
        say(left + 18 * unit, top, [words], _SOFT)
        left += 40 * unit + int(draw.textlength(words, font))
    return page
