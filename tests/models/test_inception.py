"""FID's Inception-v3 against torch."""

import numpy as np
from support.torch_inception import random_inception
from support.torch_models import TOLERANCE, nhwc, run, tensor, to_flax

from psa_jax.models.inception import Inception


def test_features_of_torch(tmp_path):
    """Neither square nor large: the last places are 3 × 2, so edges count in every pool and padding."""
    theirs = random_inception()
    kept = {name: each for name, each in theirs.state_dict().items() if not name.startswith("fc.") and each.ndim}
    ours = to_flax(lambda rngs: Inception(rngs=rngs), OnlyState(kept), tmp_path)
    pixels = tensor(2, 3, 139, 108)
    wanted = theirs(pixels).numpy()
    found = np.asarray(run(lambda model, x: model(x), ours, nhwc(pixels)))
    assert found.shape == wanted.shape == (2, 2048) and found.dtype == np.float32
    assert wanted.std() > 0.3 and np.abs(wanted[0] - wanted[1]).mean() > 0.01  # pictures do differ
    assert np.abs(found - wanted).max() <= TOLERANCE * wanted.std()


class OnlyState:
    """What `to_flax` needs of a module."""

    def __init__(self, state: dict):
        self.state_dict = lambda: state
