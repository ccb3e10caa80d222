"""Resizing and cropping, worked by hand and against torch."""

import numpy as np
import pytest

from psa_jax.data.preprocess import Preprocess


def test_crop_is_centred_and_scaled_by_hand():
    """A 4 x 8 picture whose columns are 0, 10, … 70 at 4 px: no resize, columns 2 to 5 stay."""
    image = np.broadcast_to((np.arange(8, dtype=np.uint8) * 10)[None, :, None], (4, 8, 3)).copy()
    pixels, original_size, crop = Preprocess(4)(image)
    np.testing.assert_allclose(pixels[0, :, 0], np.array([20, 30, 40, 50]) / 127.5 - 1, atol=1e-6)
    assert (pixels.shape, pixels.dtype, original_size, crop) == ((4, 4, 3), np.float32, (4, 8), (0, 2))


@pytest.mark.parametrize(
    ("size", "crop"), [((30, 20), (2, 0)), ((20, 33), (0, 3)), ((5, 5), (0, 0)), ((7, 900), (0, 637))]
)
def test_shorter_side_fits(size: tuple[int, int], crop: tuple[int, int]):
    pixels, original_size, found = Preprocess(10)(np.full((*size, 3), 255, np.uint8))
    assert (pixels.shape, original_size, found) == ((10, 10, 3), size, crop)
    np.testing.assert_array_equal(pixels, np.float32(1))


def test_resize_equals_torchvision_style_antialiasing():
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    ours = Preprocess(10)(image).pixels
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(tensor, (10, 10), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    np.testing.assert_allclose(ours, theirs.numpy() / 127.5 - 1, atol=1.1 / 127.5)  # ours rounds to whole levels
