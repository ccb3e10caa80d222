"""What is kept of pictures, with a model that is told what to say of them."""

import numpy as np
import pytest
from PIL import Image

from psa_jax.errors import PSAError
from psa_jax.evaluation.embedder import Embedder
from psa_jax.evaluation.embedding_store import EmbeddingStore


class Means:
    """The mean of a picture, times a factor, which is all that its embeddings depend on."""

    width = 1

    def __init__(self, factor: float):
        self.factor, self.weights, self.asked = factor, f"mean times {factor}", 0

    def pictures(self, pictures):
        self.asked += len(pictures)
        return np.array([[each.mean() * self.factor] for each in pictures])


def test_models_share_a_folder_and_are_asked_once(tmp_path):
    paths = []
    for index, value in enumerate((7, 200, 7)):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (4, 3), (value,) * 3).save(paths[-1])
    once, twice = Means(1.0), Means(2.0)
    assert isinstance(once, Embedder)
    for _ in range(2):
        for model in (once, twice):
            found = EmbeddingStore(tmp_path / "kept", model).pictures([*paths, paths[1]], "them")
            assert found.tolist() == [[value * model.factor] for value in (7.0, 200.0, 7.0, 200.0)]
    assert (once.asked, twice.asked) == (2, 2)  # pictures of the same bytes once
    kept = sorted((tmp_path / "kept").iterdir())
    assert len(kept) == 2 and {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    for path in kept:
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PSAError, match=r"\.npy: damaged; delete it and run again"):
        EmbeddingStore(tmp_path / "kept", once).pictures(paths, "them")
