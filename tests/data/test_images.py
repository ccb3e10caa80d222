"""Pictures from outside: only whole JPEG and PNG files of sane size are opened, whatever their names say."""

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_jax.data import images
from psa_jax.errors import PSAError

LIMIT = 10_000  # pixels


def saved(format: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: object) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(content, format=format, **options)
    return content.getvalue()


def huge_png() -> bytes:
    """A PNG of 50,000 x 50,000 pixels in some hundred bytes: a valid header, hardly any data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def test_the_pixels_and_the_size(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")  # the content counts, not the name
    np.testing.assert_array_equal(images.open_image(tmp_path / "a.jpg"), pixels)
    assert images.image_size(tmp_path / "a.jpg") == (5, 7)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(images.open_image(tmp_path / "grey.png"), np.repeat(pixels[..., :1], 3, axis=-1))
    assert images.image_size(tmp_path / "grey.png") == (5, 7)


BAD = [
    (b"", "0 bytes"),
    (b"not a picture", "neither JPEG nor PNG"),
    (saved("GIF"), "neither JPEG nor PNG"),
    (saved("WEBP"), "neither JPEG nor PNG"),
    (b"\xff\xd8\xff", "neither JPEG nor PNG|decoded"),
    (saved("JPEG")[:-1], "the end of the JPEG is missing"),
    (saved("JPEG")[:-600], "the end of the JPEG is missing"),
    (saved("JPEG").replace(b"\xff\xda", b"\xff\xd9", 1)[:-2] + b"\xff\xd9", "cannot be decoded"),
    (saved("JPEG")[:-600] + bytes(600), "the end of the JPEG is missing"),  # a download that was cut: zeros decode
    (saved("PNG")[:-600], "cannot be decoded"),
    (saved("PNG")[:30], "cannot be decoded|neither"),
    (saved("PNG")[:6000] + b"flipped" + saved("PNG")[6007:], "cannot be decoded"),
    (saved("PNG", mode="RGBA"), "alpha"),
    (saved("PNG", mode="I;16"), "over 8 bits"),
    (saved("PNG", save_all=True, append_images=[Image.new("RGB", (64, 64))]), "several pictures"),
    (saved("MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))]), "several pictures"),
    (huge_png(), "pixels"),
    (saved("PNG", (600, 600)), "600 x 600 pixels, the limit is 10000"),
]


@pytest.mark.parametrize(
    ("content", "says"), BAD, ids=[f"{number}-{says[:12]}" for number, (_, says) in enumerate(BAD)]
)
def test_bad_pictures_are_refused(tmp_path: Path, content: bytes, says: str):
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (images.open_image, images.image_size):
        with pytest.raises(PSAError, match=says) as caught:
            read(tmp_path / "a.jpg", max_pixels=LIMIT)
        assert str(caught.value).startswith(f"{tmp_path / 'a.jpg'}: ") and "\n" not in str(caught.value)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path):
    """2.5 billion pixels would take 7.5 GB and seconds; also a smaller one by our own limit."""
    (tmp_path / "a.png").write_bytes(huge_png())
    start = time.process_time()
    with pytest.raises(PSAError, match="pixels"):
        images.image_size(tmp_path / "a.png")
    assert time.process_time() - start < 1
    (tmp_path / "b.png").write_bytes(saved("PNG", (100, 101)))
    assert images.image_size(tmp_path / "b.png", max_pixels=10_100) == (101, 100)
    with pytest.raises(PSAError, match="100 x 101 pixels, the limit is 10099"):
        images.image_size(tmp_path / "b.png", max_pixels=10_099)


def test_a_huge_file_is_not_read(tmp_path: Path):
    with open(tmp_path / "a.jpg", "wb") as file:
        file.write(saved("JPEG"))
        file.truncate(images.MAX_BYTES + 1)  # sparse: takes no space
    with pytest.raises(PSAError, match=f"allowed are 1 to {images.MAX_BYTES}"):
        images.open_image(tmp_path / "a.jpg")


def test_missing_and_special_files(tmp_path: Path):
    with pytest.raises(PSAError, match="missing"):
        images.open_image(tmp_path / "absent.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(PSAError, match="not a regular file"):
            images.open_image(tmp_path / name)
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    with pytest.raises(PSAError, match="cannot be decoded"):
        images.open_image(tmp_path / "loop.jpg")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_survey_tells_of_every_picture_in_order(tmp_path: Path, processes: int):
    """Over two tasks, good and bad ones; nothing stops at a bad one, and reasons do not repeat the path."""
    paths = [tmp_path / f"{number}.jpg" for number in range(70)]
    for number, path in enumerate(paths):
        path.write_bytes(saved("JPEG", (number + 1, 3)) if number % 10 else b"")
    found = list(images.survey(paths, processes))
    assert [each.size for each in found] == [(3, number + 1) if number % 10 else None for number in range(70)]
    problems = [each.problem for each in found if each.problem]
    assert len(problems) == 7 and all(problem.startswith("0 bytes") for problem in problems)


def test_a_survey_needs_a_process(tmp_path: Path):
    with pytest.raises(PSAError, match="give 1 or more"):
        list(images.survey([tmp_path], 0))
