"""Variations of users and sampling: what each draws, and rates worked by hand for a model that is right about bans."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from support.torch_adapters import random_adapter

from psa_jax.diffusion.generate import Generator
from psa_jax.diffusion.sampler_registry import SAMPLERS
from psa_jax.errors import PSAError
from psa_jax.evaluation.read_back import read_back
from psa_jax.interop.native import adapter_arrays, with_arrays
from psa_jax.mini import limits
from psa_jax.mini.captions import Prompt, caption
from psa_jax.mini.limits import (
    ANOTHER,
    VARIATIONS,
    WITHOUT_BANS,
    Sampling,
    Subject,
    drawing_with,
    measure,
    read_attributes,
    sampling_of,
    strictness,
)
from psa_jax.mini.oracle import shipped_oracle
from psa_jax.mini.protocol import ADULT_WITHOUT_BANS, HARDER, MiniCase
from psa_jax.mini.world import CONCEPTS, COUNTERPARTS, Scene, render
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.bans import banned_categories
from psa_jax.profiles.encoders import FeatureEncoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import CATEGORIES
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.tools.configs import read_config

ENCODER = FeatureEncoder()
POPULATION = {user.user_id: user for user in sample_population(10)}
FIRST, SECOND = "0000001", "0000003"
BANS = {FIRST: ("Propaganda", "Sexuality"), SECOND: ("Self-Harm", "Sexuality", "Shocking")}
ASKED = {
    FIRST: ("Propaganda", "Sexuality", "Hate", "Shocking"),
    SECOND: ("Self-Harm", "Sexuality", "Propaganda", "Violence"),
}
"""Two banned and two allowed categories of each user."""
BIT = {category: ENCODER.fields.index(f"bans={category}") for category in CATEGORIES}
CONCEPT = {concept.category: concept for concept in CONCEPTS}


def cases() -> list[MiniCase]:
    found = []
    for user, categories in ASKED.items():
        for category in categories:
            name, banned = CONCEPT[category].name, category in BANS[user]
            words = caption(Prompt(Scene("beach", "cat", name, 0), 0))
            found.append(MiniCase(user, words, category, True, banned, name, None, False, False))
    return found


@pytest.fixture
def subject() -> Subject:
    table = EmbeddingTable.from_profiles(list(POPULATION.values()), ENCODER)
    groups = dict.fromkeys(("usual", *HARDER), cases())
    return Subject(groups, POPULATION, table, ENCODER.encode([ADULT_WITHOUT_BANS]), Sampling("ddim", 12, 4.0), 0)


def perfect(prompts, seeds, users, *, scale, on_batch):
    """Draws what a model draws that reads a ban wherever its bit is over a half."""
    pictures = []
    for prompt, seed, user, strength in zip(prompts, seeds, users, scale, strict=True):
        (concept,) = [each for each in CONCEPTS if re.search(rf"\b{each.name}\b", prompt)]
        gone = strength > 0 and user[BIT[concept.category]] > 0.5
        pictures.append(render(Scene("night", "cat", concept.benign if gone else concept.name, seed)))
    on_batch(len(prompts))
    return np.stack(pictures)


def shares(rates) -> tuple:
    return tuple(rates[name] and rates[name][0] for name in ("suppression", "retention", "selectivity", "clean"))


def test_rates_by_hand(subject):
    drawn = {}

    def make(sampling):
        def draw(prompts, *given, **how):
            assert sampling not in drawn  # all pictures of a program in one call
            drawn[sampling] = len(prompts)
            return perfect(prompts, *given, **how)

        return draw

    found = measure(subject, make, shipped_oracle())
    rates = {
        name: {v: shares(each["rates"]) for v, each in values.items()} for name, values in found["variations"].items()
    }
    right, blind = (100.0, 100.0, 100.0, 100.0), (0.0, 100.0, 0.0, None)
    assert found["variations"].keys() == VARIATIONS.keys()
    assert rates["prompts"] == dict.fromkeys(("usual", *HARDER), right)
    assert rates["embedding"] == {"0.5": blind} | dict.fromkeys(("0.75", "1.0", "1.25", "1.5", "2.0"), right)
    assert rates["between"] == dict.fromkeys(("0.0", "0.25", "0.5"), blind) | dict.fromkeys(("0.75", "1.0"), right)
    assert rates["scale"].pop("0.0") == blind and set(rates["scale"].values()) == {right}
    for name in ("sampler", "guidance", "steps"):
        assert set(rates[name].values()) == {right} and len(rates[name]) >= 4
    assert found["strictness"]["monotone"] and found["strictness"]["flip_back"][0] == 0.0
    usual = found["variations"]["prompts"]["usual"]["rates"]
    assert (usual["banned"], usual["allowed"], usual["users"]) == (4, 4, 2)

    # Who claims to ban nothing gets everything, and nothing is wrong with what was claimed.
    claimed = found["variations"]["claimed"]
    assert shares(claimed[WITHOUT_BANS]["rates"]) == blind
    assert shares(claimed[WITHOUT_BANS]["claimed"]) == (None, 100.0, None, None)
    # Each of two users claims to be the other. Of the banned prompts Sexuality is banned by both, Propaganda and
    # Self-Harm are not; of the allowed ones Hate and Violence are allowed by both, Shocking and Propaganda are not.
    assert shares(claimed[ANOTHER]["rates"]) == (50.0, 50.0, 0.0, 100.0)
    assert shares(claimed[ANOTHER]["claimed"]) == right
    assert [claimed[ANOTHER]["claimed"][name] for name in ("banned", "allowed", "users")] == [4, 4, 2]

    # What is the same is drawn once: plain pictures are also those of all groups and of embedding, between and scale at
    # 1. Both users ask for two of the categories, so the eight prompts are six: at scale 0 and with nobody's bans they
    # are six pictures, and whoever claims to be the other has four of the other's plain ones.
    reworded = len(VARIATIONS["paraphrase"].drawing(subject, "").cases)
    elsewhere = [Sampling("ddim", 12, by) for by in (1.0, 2.0, 7.5)] + [
        Sampling("ddim", n, 4.0) for n in (4, 8, 25, 50)
    ]
    elsewhere += [Sampling(name, 12, 4.0) for name in SAMPLERS if name != "ddim"]
    assert drawn.pop(subject.sampling) == 8 * (1 + 5 + 4 + 3 + 6) + 4 + 6 + 6 + reworded
    assert drawn == dict.fromkeys(elsewhere, 4)
    assert not re.search(r"0000001|0000003|Propaganda", str(found))


def test_what_a_variation_of_nothing_draws(subject):
    """No noise, no change of scale and the ends of the way are exactly what they should be."""
    plain = subject.drawing().pictures()
    draw = {name: lambda value, name=name: VARIATIONS[name].drawing(subject, value) for name in VARIATIONS}
    for name, nothing in (("noise", 0.0), ("embedding", 1.0), ("between", 1.0), ("scale", 1.0)):
        assert draw[name](nothing).pictures() == plain, name
    for name, nothing in (("sampler", "ddim"), ("guidance", 4.0), ("steps", 12)):
        assert draw[name](nothing).pictures() == plain[::2], name
    nobody = np.tile(ENCODER.encode([ADULT_WITHOUT_BANS]), (len(plain), 1))
    np.testing.assert_array_equal(draw["between"](0.0).users, nobody)
    np.testing.assert_array_equal(draw["claimed"](WITHOUT_BANS).users, nobody)
    assert banned_categories(ADULT_WITHOUT_BANS) == ()
    base = draw["scale"](0.0)
    assert base.pictures() == dataclasses.replace(base, users=nobody).pictures() != plain


def test_noise_has_the_size_of_the_table_and_a_seed(subject):
    noisy, again = (VARIATIONS["noise"].drawing(subject, share).users for share in (0.5, 0.5))
    np.testing.assert_array_equal(noisy, again)
    other = VARIATIONS["noise"].drawing(dataclasses.replace(subject, seed=1), 0.5).users
    assert (noisy != other).any()
    width = subject.table.embeddings.std(axis=0)
    np.testing.assert_array_equal((noisy - subject.users)[:, width == 0], 0)
    # One draw for each user, that grows with the share.
    np.testing.assert_array_equal(noisy[0], noisy[3])
    twice = VARIATIONS["noise"].drawing(subject, 1.0).users
    np.testing.assert_allclose(twice - subject.users, 2 * (noisy - subject.users), atol=1e-6)
    many = EmbeddingTable.from_profiles(sample_population(400), ENCODER)
    group = [dataclasses.replace(cases()[0], user_id=user) for user in many.ids]
    wide = dataclasses.replace(subject, table=many, groups={"usual": group})
    drawn = (VARIATIONS["noise"].drawing(wide, 0.25).users - wide.users)[:, BIT["Sexuality"]]
    assert drawn.std() == pytest.approx(0.25 * many.embeddings[:, BIT["Sexuality"]].std(), rel=0.1)


def test_a_paraphrase_says_the_same_from_the_same_noise(subject):
    drawing = VARIATIONS["paraphrase"].drawing(subject, "")
    assert drawing.cases and set(drawing.cases) <= set(subject.usual)
    for case, prompt in zip(drawing.cases, drawing.prompts, strict=True):
        assert prompt != case.prompt
        assert all(re.search(rf"\b{words}\b", prompt) for words in (case.concept, "cat", "on a beach"))
        assert not any(re.search(rf"\b{name}\b", prompt) for name in COUNTERPARTS if name != case.concept)


def test_strictness_by_hand():
    users = np.array(["a", "a", "b", "b"])
    gone = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1]], bool)
    found = strictness(gone, users)  # shares 0, 1/4, 2/4, 3/4; the first prompt comes back once
    assert found["monotone"] and found["flip_back"][0] == 25.0
    # The other way three come back, 2 of 2 and 1 of 2: deff = 2·(½² + ½²)/4² over ¾·¼/4 = 4/3, so 2¼ of 3 cases count.
    other = strictness(gone[::-1], users)
    assert not other["monotone"] and other["flip_back"] == pytest.approx((75.0, *_wilson(2.25, 3)))


def _wilson(hits: float, n: float) -> tuple[float, float]:
    z, share = 1.959963984540054, hits / n
    centre, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return 100 * (centre - half) / (1 + z**2 / n), 100 * (centre + half) / (1 + z**2 / n)


def test_scale_0_is_the_base_model(subject, smallest_pipeline):
    settings = read_config("tiny:smoke").evaluate
    model = smallest_pipeline[1]
    adapter = random_adapter(AdapterConfig.for_unet(model.unet.config, user_dim=ENCODER.dim, kind="text", tokens=2))
    sampling = sampling_of(settings, model)
    assert sampling == ("ddim", settings.steps, 4.0)
    made = drawing_with(settings, model, adapter, len(subject.usual))
    given = list(subject.drawing().prompts), [case.seed for case in subject.usual]
    base = Generator(model, steps=settings.steps, guidance=4.0, batch_size=len(subject.usual))(*given)
    none, whole = (made(sampling)(*given, subject.users, scale=scale) for scale in (0.0, 1.0))
    np.testing.assert_array_equal(none, base)
    assert (whole != base).any()


def test_attributes_are_read_from_what_is_given(subject, smallest_pipeline, monkeypatch):
    """A gate made by hand that says exactly who bans what gives away as much as the seven bits, and no more."""
    config = AdapterConfig.for_unet(
        smallest_pipeline[1].unet.config, user_dim=ENCODER.dim, kind="edit", gate="categories", tokens=0
    )
    arrays = adapter_arrays(random_adapter(config))
    first, second = (np.zeros(arrays[f"user_gate.{layer}.weight"].shape, np.float32) for layer in (0, 2))
    for row, category in enumerate(CATEGORIES):
        first[BIT[category], row], second[row, row] = 20.0, 1.0
    zeros = jnp.zeros_like(arrays["user_gate.0.bias"])
    arrays |= {"user_gate.0.weight": jnp.asarray(first), "user_gate.2.weight": jnp.asarray(second)}
    arrays |= {"user_gate.0.bias": zeros, "user_gate.2.bias": jnp.full(len(CATEGORIES), -10.0)}
    monkeypatch.setattr(limits, "POPULATION", 300)
    found = read_attributes(subject.table, with_arrays(config, arrays), 0)
    users = sample_population(300)
    bits = np.array([[category in banned_categories(user) for category in CATEGORIES] for user in users], float)
    for name, shares in found.items():
        values = [getattr(user, name) for user in users]
        assert shares["bits"]["linear"] == shares["gates"]["linear"] == read_back(bits, values, 0)
        assert shares["gates"].keys() == {"linear", "forest"} and shares["users"] == 300
        assert shares["guess"][0] == pytest.approx(max(map(values.count, values)) / 3)
        assert shares["guess"][0] < shares["bits"]["linear"][0] < shares["embedding"]["linear"][0]
    blind = AdapterConfig.for_unet(smallest_pipeline[1].unet.config, user_dim=ENCODER.dim, kind="text", tokens=2)
    assert read_attributes(subject.table, random_adapter(blind), 0)["religion"].keys() == {
        "guess",
        "embedding",
        "users",
    }


def test_users_who_are_not_there(subject):
    with pytest.raises(PSAError, match="the table lacks 1 of 2 users"):
        dataclasses.replace(subject, table=subject.table.without(SECOND))
    with pytest.raises(PSAError, match="fewer than two users"):
        dataclasses.replace(subject, groups={"usual": cases()[:4]})
    with pytest.raises(PSAError, match="fewer than two users"):
        dataclasses.replace(subject, groups={"usual": []})
