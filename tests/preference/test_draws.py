"""Random timesteps of a batch of pairs. Fixed draws are tested with the reference that is evaluated on them."""

import jax
import numpy as np

from psa_jax.preference.draws import spread_timesteps


def test_timesteps_cover_the_range_evenly():
    """One in each of 16 parts of [200, 800), every pair as likely to get any part."""
    draw = jax.vmap(lambda key: spread_timesteps(key, 16, 200.0, 800.0))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    parts = np.sort((drawn - 200) // 37.5, axis=1)
    assert (parts == np.arange(16)).mean() > 0.99  # 37.5 steps a part: rounding down may cross a border
    assert drawn.min() == 200 and drawn.max() == 799
    means = drawn.mean(axis=0)  # of each pair: uniform with deviation 600/√12
    assert np.abs(means - 499.5).max() < 4.5 * 600 / np.sqrt(12 * 2000)
    assert (np.diff(drawn[:, 0]) != 0).any()


def test_spread_timesteps_of_one_pair_stay_in_range():
    keys = jax.random.split(jax.random.key(3), 5000)
    drawn = np.asarray(jax.vmap(lambda key: spread_timesteps(key, 1, 0.0, 1000.0))(keys))
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert abs(drawn.mean() - 499.5) < 4.5 * 1000 / np.sqrt(12 * 5000)
