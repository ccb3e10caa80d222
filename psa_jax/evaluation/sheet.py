"""The grid of pictures as one labelled picture, for a README or a slide."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from psa_jax.evaluation.report import Grid

SCALE = 2
_TEXT, _SOFT, _BACK = (28, 27, 26), (95, 91, 86), (255, 255, 255)
_BANNED, _ALLOWED, _NOBODY = (179, 68, 11), (15, 111, 134), (200, 196, 190)
_SIDE, _GAP, _FRAME, _LETTER, _LINE = 230, 14, 4, 7, 16


def sheet(grid: Grid) -> Image.Image:
    """Makes the sheet: prompts on the left, users above; a frame's colour says whether the user bans the content.

    Args:
      grid: pictures by prompt and user.
    """
    height, width = (side * SCALE for side in grid.pictures.shape[1:3])
    columns, rows = len(grid.users), len(grid.prompts)
    headings = [textwrap.wrap(user, width // _LETTER) for user in grid.users]
    head = 4 + _LINE * max(map(len, headings)) + 2 * _FRAME
    page = Image.new("RGB", (_SIDE + columns * (width + _GAP), head + rows * (height + _GAP) + 26), _BACK)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, lines in enumerate(headings):
        draw.multiline_text((_SIDE + column * (width + _GAP), 4), "\n".join(lines), _TEXT, font, spacing=2)
    for row, prompt in enumerate(grid.prompts):
        top = head + row * (height + _GAP)
        lines = textwrap.wrap(prompt, _SIDE // _LETTER - 3)
        draw.multiline_text((8, top + 4), "\n".join(lines), _TEXT, font, spacing=2)
        for column in range(columns):
            left = _SIDE + column * (width + _GAP)
            colour = {None: _NOBODY, True: _BANNED, False: _ALLOWED}[grid.banned[row][column]]
            draw.rectangle((left - _FRAME, top - _FRAME, left + width + _FRAME - 1, top + height + _FRAME - 1), colour)
            picture = Image.fromarray(np.asarray(grid.pictures[row * columns + column]))
            page.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
    bottom = page.height - 22
    left = _SIDE
    for colour, words in ((_BANNED, "banned by this user's profile"), (_ALLOWED, "allowed"), (_NOBODY, "no user")):
        draw.rectangle((left, bottom + 2, left + 12, bottom + 14), colour)
        draw.text((left + 18, bottom), words, _SOFT, font)
        left += 40 + int(draw.textlength(words, font))
    return page
