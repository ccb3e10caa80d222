"""The labelled picture of a grid."""

import numpy as np
import pytest

from psa_jax.diffusion.picture_sheet import picture_sheet, scale_of


def test_every_picture_is_there_in_its_place_with_its_frame():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    pictures = pictures.repeat(4, axis=1).repeat(4, axis=2)  # 32 x 32
    page = np.asarray(picture_sheet(pictures, ["base model", "a child"], ["one", "two"], [[None, True], [None, False]]))
    corners, frames = [], []
    for picture in pictures:
        large = picture.repeat(scale_of(32), axis=0).repeat(scale_of(32), axis=1)
        places = np.argwhere((page[: -large.shape[0], : -large.shape[1]] == large[0, 0]).all(axis=-1))
        (corner,) = [
            (y, x) for y, x in places if np.array_equal(page[y : y + large.shape[0], x : x + large.shape[1]], large)
        ]
        corners.append(corner)
        frames.append(tuple(page[corner[0] - 2, corner[1] - 2]))
    assert corners[0][0] == corners[1][0] < corners[2][0] == corners[3][0]
    assert corners[0][1] == corners[2][1] < corners[1][1] == corners[3][1]
    assert frames[0] == frames[2]
    assert len(set(frames)) == 3  # no user, banned, allowed
    assert (page != 255).any(axis=-1)[: corners[0][0] - 8].any()  # headings


def test_long_headings_get_the_room_they_need():
    """Every line is there, above the frames: the same page with one more line is that much higher."""
    pictures = np.zeros((1, 64, 64, 3), np.uint8)

    def page(heading):
        return np.asarray(picture_sheet(pictures, [heading], ["one"], [[None]]))

    short, long = page("bans one"), page(" ".join(["bans"] * 30))
    frame = [int(np.argmax((p == (200, 196, 190)).all(axis=-1).any(axis=1))) for p in (short, long)]
    lines = (long[: frame[1]] != 255).any(axis=(1, 2))
    assert long.shape[0] - short.shape[0] == frame[1] - frame[0] > 0
    assert not lines[-2:].any()  # no letter runs into the frame
    assert np.diff(lines.astype(int)).clip(min=0).sum() + lines[0] >= 30 * 5 // (128 // 7)  # that many lines of text


@pytest.mark.parametrize(("side", "scale"), [(32, 4), (64, 2), (300, 1), (1024, 1)])
def test_letters_grow_with_the_pictures(side, scale):
    """The prompt and the corner take the same share of a sheet of small and of large pictures."""
    assert scale_of(side) == scale
    page = picture_sheet(np.zeros((1, side, side, 3), np.uint8), ["user 1"], ["a cat " * 99], [[True]], "step 1,000")
    unit = max(1, side * scale // 256)
    assert page.width == 230 * unit + side * scale + 14 * unit
    margin = (np.asarray(page)[:, : 220 * unit] != 255).any(axis=-1)
    head = 4 * unit + 16 * unit + 8 * unit
    assert margin[: head - 8 * unit].any() and not margin[:head, 200 * unit :].any()
    bottom = head + side * scale  # a prompt that is too long ends beside its picture
    assert margin[head:bottom].any() and not margin[bottom:].any()
