"""FID of pictures: how they are prepared, the network's features of them, and the distance."""

import hashlib

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from support.torch_inception import SMALLEST, published, random_inception
from support.torch_models import TOLERANCE

from psa_jax.evaluation import embedder, inception_embeddings
from psa_jax.evaluation.embedding_store import EmbeddingStore
from psa_jax.evaluation.inception_embeddings import InceptionEmbeddings, clean_pixels
from psa_jax.evaluation.measures import frechet_distance


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A file as published, and the network in torch."""
    theirs = random_inception()
    return published(theirs, tmp_path_factory.mktemp("network") / "inception.pth"), theirs


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, scaled up by a factor, so that it has large even places and sharp edges."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return small.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]


@pytest.mark.parametrize("size", [(64, 64), (299, 299), (512, 400), (31, 700)], ids=str)
def test_pixels_of_clean_fid(size):
    """Its resizing: Pillow's bicubic filter of each channel in mode F, not rounded to bytes, clipped; then Inception's
    range of -1 to 1."""
    image = Image.fromarray(picture(*size))
    bands = [band.convert("F").resize((299, 299), Image.BICUBIC) for band in image.split()]
    wanted = (np.clip(np.stack([np.array(band) for band in bands], axis=2), 0, 255) - 128) / 128
    found = clean_pixels(np.asarray(image))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert found.min() >= -1.0 and found.max() <= 127 / 128
    if size == (299, 299):
        np.testing.assert_array_equal(found * 128 + 128, image)
    else:
        assert (found * 128 % 1 != 0).mean() > 0.5  # between bytes


def test_features_of_pictures(network, monkeypatch):
    """Three pictures in batches of two, at FID's own size."""
    monkeypatch.setattr(embedder, "BATCH", 2)
    file, theirs = network
    pictures = [picture(64, 64), picture(299, 299, seed=1), picture(80, 333, seed=2)]
    ours = InceptionEmbeddings(file)
    found = ours.pictures(pictures)
    pixels = np.stack([clean_pixels(each).transpose(2, 0, 1) for each in pictures])
    wanted = theirs(torch.from_numpy(pixels)).numpy()
    assert found.shape == (3, ours.width) and found.dtype == np.float64
    assert np.abs(found - wanted).max() <= TOLERANCE * wanted.std()
    assert ours.weights.startswith(f"{hashlib.sha256(file.read_bytes()).hexdigest()}, resized to 299 x 299 by ")


def test_a_fid_of_torch_and_scipy(network, monkeypatch, tmp_path):
    """Pictures on disk, more of one set than of the other, against torch's features and SciPy's general root."""
    monkeypatch.setattr(inception_embeddings, "SIDE", SMALLEST)  # what it costs goes with the square
    file, theirs = network
    paths = []
    for index in range(11):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(picture(40, 52, seed=index) // (1 + index // 6)).save(paths[-1])
    store = EmbeddingStore(tmp_path / "kept", InceptionEmbeddings(file))
    found = frechet_distance(store.pictures(paths[:6], "ours"), store.pictures(paths[6:], "reference"))
    pixels = np.stack([clean_pixels(np.asarray(Image.open(path))).transpose(2, 0, 1) for path in paths])
    features = theirs(torch.from_numpy(pixels)).numpy().astype(np.float64)
    wanted = of_the_definition(features[:6], features[6:])
    assert wanted > 1.0 and found == pytest.approx(wanted, rel=1e-4)


def of_the_definition(ours: np.ndarray, reference: np.ndarray) -> float:
    """All pictures lie in a space of as many dimensions as there are pictures: distances in it are the same."""
    basis = scipy.linalg.orth(np.concatenate([ours, reference]).T)
    (mean1, cov1), (mean2, cov2) = (
        (rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (ours @ basis, reference @ basis)
    )
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * root.real))
