"""The labelled picture of a grid."""

import numpy as np

from psa_jax.evaluation.report import Grid
from psa_jax.evaluation.sheet import SCALE, sheet


def test_every_picture_is_there_in_its_place_with_its_frame():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    pictures = pictures.repeat(4, axis=1).repeat(4, axis=2)  # 32 x 32
    words = [["shown", "replaced"]] * 2
    page = np.asarray(
        sheet(Grid(["base model", "a child"], ["one", "two"], [[None, True], [None, False]], pictures, words))
    )
    corners, frames = [], []
    for picture in pictures:
        large = picture.repeat(SCALE, axis=0).repeat(SCALE, axis=1)
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
        return np.asarray(sheet(Grid([heading], ["one"], [[None]], pictures, [["shown"]])))

    short, long = page("bans one"), page(" ".join(["bans"] * 30))
    frame = [int(np.argmax((p == (200, 196, 190)).all(axis=-1).any(axis=1))) for p in (short, long)]
    lines = (long[: frame[1]] != 255).any(axis=(1, 2))
    assert long.shape[0] - short.shape[0] == frame[1] - frame[0] > 0
    assert not lines[-2:].any()  # no letter runs into the frame
    assert np.diff(lines.astype(int)).clip(min=0).sum() + lines[0] >= 30 * 5 // (128 // 7)  # that many lines of text
