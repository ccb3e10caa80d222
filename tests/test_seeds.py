"""Every seed draws something of its own, or is refused in one line."""

import jax
import numpy as np
import pytest
from PIL import Image

from psa_jax.cli import main
from psa_jax.data.shards import RowColumns
from psa_jax.data.validation import validation_batches
from psa_jax.diffusion.generate import initial_latents, picture_keys
from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import select_cases
from psa_jax.mini.captions import sample_scenes
from psa_jax.mini.dataset import render_mini
from psa_jax.mini.oracle import render_pairs
from psa_jax.preference.draws import fixed_draws_or_none
from psa_jax.preference.objective import Objective
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.levels import find_levels
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.seeds import check_seed, seed_words

SEEDS = [0, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 7 + 2**32, 7 + 2**40, 2**63 - 1, 2**63, 2**64 - 1]


def test_keys_of_pictures_are_those_that_jax_makes_with_64_bits():
    with jax.enable_x64(True):
        expected = [jax.random.key_data(jax.random.key(np.uint64(seed), impl="threefry2x32")) for seed in SEEDS]
    np.testing.assert_array_equal(jax.random.key_data(picture_keys(SEEDS)), np.stack(expected))


def test_seeds_of_one_word_have_the_noise_they_always_had():
    for seed in SEEDS[:5]:
        expected = jax.random.normal(jax.random.key(seed), (4, 4, 4))
        np.testing.assert_array_equal(initial_latents([seed], (4, 4, 4))[0], expected)
    # JAX's own documented stream, as numbers: whatever changes it changes every picture.
    np.testing.assert_allclose(
        jax.random.normal(jax.random.key(42), (3,)), [-0.02830462, 0.46713185, 0.29570296], atol=1e-6
    )


def test_every_seed_has_its_own_noise_and_another_generator_set_by_default_changes_none():
    noise = np.asarray(initial_latents(SEEDS, (2, 2, 4)))
    assert len({picture.tobytes() for picture in noise}) == len(SEEDS)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(initial_latents(SEEDS, (2, 2, 4)), noise)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, True, float("nan")])
def test_what_is_no_seed_of_a_picture(seed):
    with pytest.raises(PSAError, match="give a whole number from 0 to 18446744073709551615"):
        seed_words(seed)


def test_numpy_numbers_are_seeds():
    assert check_seed(np.uint32(7)) == 7
    assert seed_words(np.uint64(2**63 + 5)) == (2**31, 5)


class OneRow:
    """A source of rows that nothing reads."""

    columns = RowColumns(["0000001"], np.zeros(1, np.int32), *[np.zeros(1, np.bool_)] * 3)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> dict:
        return {}


PROFILES = sample_population(12)
TABLE = EmbeddingTable.from_profiles(PROFILES, get_encoder("features"))


@pytest.mark.parametrize("seed", [-1, 2**32, 7 + 2**40])
@pytest.mark.parametrize(
    "use",
    [
        lambda seed, _: sample_population(1, seed),
        lambda seed, _: find_levels(TABLE, PROFILES, seed),
        lambda seed, folder: render_mini(folder / "mini", 1, seed),
        lambda seed, _: next(sample_scenes(1, seed)),
        lambda seed, _: render_pairs(1, seed),
        lambda seed, _: select_cases([], 1, seed),
        lambda seed, _: fixed_draws_or_none(1, seed, Objective(), flips=False),
        lambda seed, _: next(validation_batches(OneRow(), TABLE, batch_size=1, seed=seed)),
    ],
    ids=["population", "levels", "mini", "scenes", "pairs", "cases", "reference", "validation"],
)
def test_other_seeds_have_one_word(use, seed, tmp_path):
    with pytest.raises(PSAError, match=rf"seed.* is {seed}; give a whole number from 0 to 4294967295"):
        use(seed, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_draws_every_seed_or_none(sd1, tmp_path, capsys):
    prompts = tmp_path / "seeds.csv"
    prompts.write_text("prompt,seed\n" + "".join(f"a cat,{seed}\n" for seed in (7, 7 + 2**32, 2**63)))
    out = tmp_path / "out"
    words = ["generate", f"--model={sd1[0]}", "--steps=1", "--guidance=1", f"--out={out}"]
    assert main([*words, f"--prompts={prompts}", "--images=2"]) == 0
    pictures = [np.asarray(Image.open(path)).tobytes() for path in sorted(out.glob("*.png"))]
    assert len(pictures) == len(set(pictures)) == 6
    capsys.readouterr()

    other = [*words[:-1], f"--out={tmp_path / 'other'}"]
    for bad in (["--seed=-1"], [f"--seed={2**64}"], [f"--seed={2**64 - 2}", "--images=3"]):
        assert main([*other, "--prompt=a", *bad]) == 1
        error = capsys.readouterr().err
        assert error.startswith("psa-jax: error: ") and error.count("\n") == 1
        assert "give a whole number from 0 to 18446744073709551615" in error
    for cell in ("-1", "1.5", "٣", str(2**64), "1" * 5000):
        prompts.write_text(f"prompt,seed\na,{cell}\n", encoding="utf-8")
        assert main([*other, f"--prompts={prompts}"]) == 1
        error = capsys.readouterr().err
        assert "line 2: seed" in error and error.count("\n") == 1 and len(error) < 300
    assert not (tmp_path / "other").exists()
