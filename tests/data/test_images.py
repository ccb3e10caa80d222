"""Pictures from outside: only whole JPEG and PNG files of sane size are opened, whatever their names say."""

import io
import os
import struct
import time
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from psa_jax.data import images
from psa_jax.errors import PSAError

LIMIT = 10_000  # pixels


def content_of(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format=format, **options)
    return content.getvalue()


def saved(format: str, size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return content_of(Image.fromarray(noise).convert(mode), format, **options)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags.tobytes()


def late_exif(orientation: int) -> bytes:
    """A PNG with its EXIF data behind the pixels, as PNG allows."""
    chunk = b"eXIf" + exif(orientation).removeprefix(b"Exif\0\0")
    content = saved("PNG", (9, 5))
    return (
        content[:-12] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[-12:]
    )


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


TRAILERS = {
    "zeros": bytes(3),
    "line feed": b"\n",
    "film": b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 9,
    "picture": saved("JPEG"),
}
_XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>8</tiff:Orientation></x:xmpmeta>'
GOOD = {
    **{f"jpeg, then {name}": saved("JPEG", (9, 5)) + trailer for name, trailer in TRAILERS.items()},
    **{f"png, then {name}": saved("PNG", (9, 5)) + trailer for name, trailer in TRAILERS.items()},
    **{f"jpeg held {way}": saved("JPEG", (9, 5), exif=exif(way)) for way in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)},
    "png held 6": saved("PNG", (9, 5), exif=exif(6)),
    "png held 6, said last": late_exif(6),
    "jpeg held 8 by XMP": saved("JPEG", (9, 5), xmp=_XMP.encode()),
    "jpeg with the end marker of a preview": saved("JPEG", (9, 5), exif=exif(3) + saved("JPEG", (4, 4))),
    "restart markers": saved("JPEG", (64, 64), restart_marker_blocks=1),
    "progressive": saved("JPEG", (64, 64), progressive=True) + bytes(2),
    "inks": saved("JPEG", (9, 5), "CMYK", exif=exif(6)) + bytes(2),  # Adobe's, inverted
    "grey": saved("JPEG", (9, 5), "L", exif=exif(6)),
    "two colours": saved("PNG", (9, 5), "1", exif=exif(5)),
    "palette": content_of(Image.fromarray(np.arange(45, dtype=np.uint8).reshape(5, 9)).quantize(16), exif=exif(5)),
    "profile": saved("JPEG", (9, 5), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "several": saved("MPO", (9, 5), save_all=True, append_images=[Image.new("RGB", (4, 4))], exif=exif(6)),
}


@pytest.mark.parametrize("name", GOOD)
def test_pictures_are_as_pillow_shows_them(tmp_path: Path, name: str):
    path = tmp_path / "a.jpg"
    path.write_bytes(GOOD[name])
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(images.open_image(path), expected)
    assert images.image_size(path) == expected.shape[:2]


def test_a_picture_held_sideways_by_hand(tmp_path: Path):
    """Orientation 6: what the file calls its left side is the top, seen from the right."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif(6))
    expected = [[pixels[1, x], pixels[0, x]] for x in range(3)]
    np.testing.assert_array_equal(images.open_image(tmp_path / "a.png"), expected)


def test_what_a_refusal_of_another_format_advises_works(tmp_path: Path):
    path = tmp_path / "a.jpg"
    path.write_bytes(saved("WEBP", (9, 5), lossless=True, exif=exif(6)))
    with pytest.raises(PSAError) as caught:
        images.open_image(path)
    advice = str(caught.value).split("with Pillow: ")[1].replace("FILE", repr(str(path)))
    eval(advice.replace("OTHER", repr(str(tmp_path / "b.jpg"))))
    with Image.open(path) as image:
        np.testing.assert_array_equal(images.open_image(tmp_path / "b.jpg"), ImageOps.exif_transpose(image))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about EXIF data and pictures that it gives up on
def test_damage_is_one_line_or_as_pillow_shows_it(tmp_path: Path):
    rng, path = np.random.default_rng(0), tmp_path / "a.jpg"
    shown = 0
    for name in ("jpeg held 6", "several", "inks"):
        for _ in range(80):
            content = bytearray(GOOD[name])
            for place in rng.integers(4, min(600, len(content)), 2):
                content[place] = rng.integers(256)
            path.write_bytes(content)
            try:
                found = images.open_image(path)
            except PSAError as error:
                assert "\n" not in str(error)
                continue
            with Image.open(path) as image:
                np.testing.assert_array_equal(found, ImageOps.exif_transpose(image).convert("RGB"))
            shown += 1
    assert 60 < shown < 240


BAD = [
    (b"", "0 bytes"),
    (b"not a picture", "neither JPEG nor PNG"),
    (saved("GIF"), "content is GIF, neither JPEG nor PNG"),
    (saved("WEBP"), "content is WebP, neither JPEG nor PNG"),
    (saved("TIFF"), "content is TIFF"),
    (b"\0\0\0\x20ftypavif" + bytes(40), "content is AVIF"),
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
    (saved("MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))])[:3000], "the end of the JPEG is missing"),
    (saved("JPEG")[:-600] + saved("JPEG", (8, 8)), "the end of the JPEG is missing"),  # the end of another picture
    (saved("JPEG", exif=exif(6), icc_profile=b"\xff\xd9" * 9)[:-600] + bytes(600), "the end of the JPEG is missing"),
    (saved("PNG", exif=b"Exif\0\0" + b"no TIFF at all"), "EXIF data cannot be read .* save it without them"),
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


class Died:
    """Stands for processes of which one dies at the second chunk."""

    def __init__(self, *args, **options):
        pass

    def map(self, function, chunks):
        yield [images.Surveyed((1, 1), None)] * len(chunks[0])
        raise BrokenProcessPool

    def shutdown(self, **options):
        pass


def test_a_process_that_dies_says_where(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(images, "ProcessPoolExecutor", Died)
    paths = [tmp_path / f"{number}.jpg" for number in range(3 * images._CHUNK)]
    with pytest.raises(PSAError, match=f"died, at {paths[images._CHUNK]} or up to .* give --processes=1"):
        list(images.survey(paths, 2))


def test_a_survey_needs_a_process(tmp_path: Path):
    with pytest.raises(PSAError, match="give 1 or more"):
        list(images.survey([tmp_path], 0))
