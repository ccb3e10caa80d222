"""The shipped oracle on pictures it has never seen."""

import numpy as np
import pytest

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import TINY, load_vae
from psa_jax.mini.base_model import roundtrip
from psa_jax.mini.oracle import ASSETS, DEBRIS, Oracle, Reading, load_oracle, render_pairs, shipped_oracle
from psa_jax.mini.world import BENIGN, CONCEPTS, NO_PICTOGRAM, PICTOGRAMS


def test_held_out_pictures_through_the_vae():
    pairs = render_pairs(200, seed=987_654)
    reading = shipped_oracle()(roundtrip(load_vae(TINY), pairs["images"]))
    assert np.mean(reading.pictograms == pairs["labels"][:, :2]) >= 0.99
    assert np.mean(reading.subject == pairs["labels"][:, 2]) >= 0.99


def test_two_pictures_mixed_are_debris():
    pairs = render_pairs(200, seed=5)
    keep = (pairs["labels"][:, :2] != NO_PICTOGRAM).any(axis=1)
    mixed = ((pairs["images"].astype(np.uint16) + pairs["others"]) // 2).astype(np.uint8)[keep]
    assert np.mean((shipped_oracle()(mixed).pictograms == DEBRIS).any(axis=1)) >= 0.9


def test_readings():
    benign, none = PICTOGRAMS.index(BENIGN[2]), NO_PICTOGRAM
    sides = [(0, none), (none, benign), (none, none), (DEBRIS, none), (benign, 0), (benign, DEBRIS), (0, 27)]
    reading = Reading(np.array(sides), np.zeros(7, np.int32))
    first, last = CONCEPTS[0].category, CONCEPTS[27].category
    categories = [{first}, set(), set(), set(), {first}, set(), {first, last}]
    assert [reading.categories(i) for i in range(7)] == categories
    assert [reading.is_clean(i) for i in range(7)] == [False, True, True, False, False, False, False]
    assert reading.shown(4) == {BENIGN[2], CONCEPTS[0].name} and reading.shown(3) == set()


def test_a_reading_does_not_depend_on_the_batch():
    images = render_pairs(10, seed=6)["images"]
    small = Oracle(load_oracle(ASSETS / "oracle.safetensors"), batch_size=4)(images)
    assert np.array_equal(small.pictograms, shipped_oracle()(images).pictograms)


def test_weights_are_small_and_must_exist(tmp_path):
    assert (ASSETS / "oracle.safetensors").stat().st_size <= 1_000_000
    with pytest.raises(PSAError, match="oracle weights not found; .*remove it and run psa-jax pretrain again"):
        load_oracle(tmp_path / "none.safetensors")
