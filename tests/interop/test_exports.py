"""An adapter as an IP-Adapter, in the torch original's words, baked into a UNet, and described on a card."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from huggingface_hub import ModelCard, ModelCardData
from support.torch_adapters import attention, file_tensors, random_adapter, user_tokens
from support.torch_models import UNETS, tensor

from psa_jax import cli
from psa_jax.errors import PSAError
from psa_jax.interop.baked import bake
from psa_jax.interop.ip_adapter import to_ip_adapter
from psa_jax.interop.model_card import Terms, model_card
from psa_jax.interop.native import to_file
from psa_jax.interop.upstream import as_published, read_bin, write_bin
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.config import UNetConfig
from psa_jax.models.unet import UNet
from psa_jax.tools.configs import load_config

LAYERS = ((16, 2), (24, 3))
WHERE = Path("a.safetensors")


def make(kind: str, tokens: int):
    adapter = random_adapter(AdapterConfig(kind, tokens, 7, 20, LAYERS), seed=tokens)
    return adapter, to_file(adapter)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_an_ip_adapter_of_four_tokens_gives_the_same_answer(tokens):
    adapter, tensors = make("published", tokens)
    found = {name: torch.tensor(t) for name, t in to_ip_adapter(tensors, adapter.config, WHERE).items()}
    assert found["image_proj.proj.weight"].shape == (4 * 20, 7)
    user, query = tensor(3, 7), tensor(3, 5, 24, seed=1)
    native = file_tensors(adapter)
    z = user_tokens(native, user, 20)
    as_native = {name.replace("image_proj", "user_proj"): t for name, t in found.items()}
    four = user_tokens(as_native, user, 20)
    assert four.shape == (3, 4, 20)
    keys, values = (native[f"psa_adapter.1.to_{p}_user.0.weight"] for p in "kv")
    ip_keys, ip_values = (found[f"ip_adapter.3.to_{p}_ip.weight"] for p in "kv")
    expected = attention(query, z @ keys.T, z @ values.T, 3)
    answer = attention(query, four @ ip_keys.T, four @ ip_values.T, 3)
    assert expected.std() > 0.1
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tokens"), [("published", 3), ("published", 8), ("text", 4), ("concept", 2), ("prompt", 4), ("prompt", 1)]
)
def test_what_stock_diffusers_cannot_express(kind, tokens):
    adapter, tensors = make(kind, tokens)
    with pytest.raises(PSAError, match=r"psa_jax\.torch \(load_psa\)"):
        to_ip_adapter(tensors, adapter.config, WHERE)


@pytest.mark.parametrize("kind", ["text", "concept"])
def test_one_token_is_the_published_adapter(kind):
    adapter, tensors = make(kind, 1)
    published = as_published(tensors, adapter.config, WHERE, "upstream")
    assert published.keys() == make("published", 1)[1].keys()
    assert all(np.array_equal(published[name], tensor) for name, tensor in tensors.items())


def test_upstream_file_as_torch_reads_it(tmp_path):
    _, tensors = make("published", 1)
    write_bin(tensors, tmp_path / "psa_adapter.bin")
    state = torch.load(tmp_path / "psa_adapter.bin", weights_only=True)
    assert sorted(state) == ["psa_adapter", "user_proj"]
    assert set(state["user_proj"]) == {"proj.weight", "proj.bias", "norm.weight", "norm.bias"}
    assert set(state["psa_adapter"]) == {f"{i}.to_{p}_user.0.weight" for i in (0, 1) for p in "kv"}
    for group, found in state.items():
        for name, value in found.items():
            np.testing.assert_array_equal(value.numpy(), tensors[f"{group}.{name}"])
    again = read_bin(tmp_path / "psa_adapter.bin")
    assert {name: t.tobytes() for name, t in again.items()} == {name: t.tobytes() for name, t in tensors.items()}


def test_another_pickle_of_tensors(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "a.bin")
    with pytest.raises(PSAError, match="not an adapter of the torch original"):
        read_bin(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("linear_deep", "published", marks=pytest.mark.slow),
        ("mid_only", "published"),
        ("mid_only", "text"),
        ("mid_only", "concept"),
    ],
)
def test_a_baked_unet_is_the_adapted_one(name, kind):
    unet = UNet(UNetConfig.from_json(UNETS[name]), rngs=nnx.Rngs(0))
    adapter = random_adapter(AdapterConfig.for_unet(unet.config, user_dim=7, kind=kind, tokens=1))
    shapes = [(2, 6, 6, 4), (2, 5, unet.config.cross_attention_dim), (1, 7)]
    latents, text, user = (jnp.asarray(tensor(*shape, seed=i).numpy()) for i, shape in enumerate(shapes))

    @jax.jit
    def predict(unet, contexts):
        return unet(latents, jnp.float32([3, 700]), contexts)

    context = jax.jit(UNet.context)
    contexts = adapter(unet, text, jnp.tile(user, (2, 1)), jnp.full((2,), 0.37))
    before = np.asarray(predict(unet, context(unet, text)))
    baked = bake(unet, adapter, user, 0.37)
    expected = np.asarray(predict(unet, contexts))
    output = np.asarray(predict(baked, context(baked, text)))
    assert np.abs(before - expected).max() > 0.1
    assert np.abs(output - expected).max() <= 1e-5
    # the UNet given is left alone
    np.testing.assert_array_equal(predict(unet, context(unet, text)), before)


@pytest.mark.parametrize(("kind", "tokens"), [("published", 2), ("text", 4), ("prompt", 1)])
def test_what_cannot_be_baked(kind, tokens):
    unet = UNet(UNetConfig.from_json(UNETS["mid_only"]), rngs=nnx.Rngs(0))
    adapter = random_adapter(AdapterConfig.for_unet(unet.config, user_dim=7, kind=kind, tokens=tokens))
    with pytest.raises(PSAError, match=r"psa_jax\.torch"):
        bake(unet, adapter, jnp.zeros((1, 7)))


ABOUT = {
    "family": "sd1",
    "base_model": "ab12",
    "encoder": "features",
    "encoder_fingerprint": "features-1",
    "standardised": False,
    "objective": {"beta": 60.0, "sft_weight": 36.0},
    "steps": 540,
    "versions": {"psa_jax": "0.1", "jax": "0.10.2"},
}
REPORT = {"unseen": {"psa": {"selectivity": 83.21, "suppression": 90.0, "retention": 93.2, "clean": 29.0, "n": 268}}}
SAMPLING = {"sampling": {"unconditional": "off", "guidance": 4.0, "steps": 12}}


@pytest.mark.parametrize("format_", ["native", "upstream", "ip-adapter", "baked", "diffusers"])
def test_card(format_):
    config = AdapterConfig("text", 4, 35, 768, LAYERS)
    card = model_card(config, ABOUT, format_, "weights.safetensors", REPORT | SAMPLING)
    assert card.startswith("---\nlicense: unknown\n")
    assert card.count("\n---\n") == 1
    for fact in ("`text`", "| 35 |", "sd1", "`ab12`", "features", "60.0", "540", "jax 0.10.2"):
        assert fact in card, fact
    drawn_so = format_ in ("native", "diffusers")
    assert all((fact in card) == drawn_so for fact in ("| 83.2 |", "268"))
    assert ("Not measured in this way" in card) != drawn_so
    for part in ("## How to load", "## Limits", "## Privacy and misuse", "no access control"):
        assert part in card
    assert ("one user's embedding" in card) == (format_ == "baked")


def test_the_cards_advice_is_a_command():
    card = model_card(AdapterConfig("text", 4, 35, 768, LAYERS), ABOUT, "baked", "a", REPORT | SAMPLING)
    (advice,) = re.findall(r"`psa-jax (demo [^`]+)`", card)
    name, *words = advice.split()
    args = cli._command_parser(name).parse_args(words)
    assert args.all_ways and args.workdir == Path("runs/demo")
    config, rest = load_config([f"--config={args.config}"])
    assert config.model == "tiny" and not rest


def test_card_of_rates_that_do_not_say_how_they_were_measured():
    card = model_card(AdapterConfig("text", 4, 35, 768, LAYERS), ABOUT, "native", "a.safetensors", REPORT)
    assert "83.2" not in card and "Not measured in this way" in card


def test_card_of_one_user_at_another_scale():
    config, rates = AdapterConfig("text", 1, 35, 768, LAYERS), {"unseen": {"psa_same": REPORT["unseen"]["psa"]}}
    whole, half = (model_card(config, ABOUT, "baked", "", SAMPLING | rates, scale) for scale in (1.0, 0.5))
    assert "| 83.2 |" in whole and "side `same`, scale 1, steps 12, guidance 4.0" in whole
    assert "83.2" not in half and "Not measured at scale 0.5" in half
    assert "psa-jax demo" not in half  # which measures at scale 1


def test_card_of_what_is_not_known():
    card = model_card(AdapterConfig("published", 1, 3584, 768, LAYERS), {}, "native", "a.safetensors")
    assert "None" not in card
    assert "No evaluation came with this adapter" in card


HUB = {
    "native": ("psa_jax", "adapter"),
    "upstream": ("psa_jax", "adapter"),
    "ip-adapter": ("diffusers", "adapter"),
    "baked": ("diffusers", "finetune"),
    "diffusers": ("diffusers", "adapter"),
}
"""Format → its library and relation to the base model, in the Hub's words."""


@pytest.mark.parametrize("format_", HUB)
def test_the_hub_reads_licence_and_base_model_from_the_card(format_):
    """huggingface_hub reads the same values from our YAML as from a card that it writes itself."""
    config, library = AdapterConfig("text", 1, 35, 768, LAYERS), HUB[format_][0]
    tags = ["stable-diffusion", "personalized-safety-alignment", "psa_jax"]
    same = dict(library_name=library, pipeline_tag="text-to-image", tags=tags)
    stated = Terms("openrail++", "stabilityai/stable-diffusion-xl-base-1.0")
    for terms, values in (
        (None, {"license": "unknown"}),
        (stated, {"license": "openrail++", "base_model": stated.base_model, "base_model_relation": HUB[format_][1]}),
    ):
        card = ModelCard(model_card(config, ABOUT, format_, "a.safetensors", terms=terms), ignore_metadata_errors=False)
        assert card.data.to_dict() == ModelCardData(**values, **same).to_dict()
        assert card.text.lstrip().startswith("# A personal safety adapter")
        assert ("huggingface.co/stabilityai/stable-diffusion-xl-base-1.0" in card.text) == (terms is stated)


def test_a_gate_without_a_model_draws_nothing():
    data = ModelCard(model_card(GATED, ABOUT, "gates", "gates.npz", terms=Terms("mit", "a/b"))).data.to_dict()
    assert (data["license"], data["pipeline_tag"]) == ("mit", "tabular-classification")
    assert "base_model" not in data


GATED = AdapterConfig("edit", 0, 35, 768, LAYERS, gate="categories")


def test_the_card_says_whose_licence_holds_for_what():
    config = AdapterConfig("text", 1, 35, 768, LAYERS)

    def words(format_, *terms):
        return " ".join(
            model_card(config, ABOUT, format_, "a", terms=Terms(*terms))
            .partition("## Licence")[2]
            .partition("##")[0]
            .split()
        )

    assert "not stated (`psa-jax export --license=ID` states it)" in words("native")
    assert words("native", "unknown") == words("native")
    assert "`mit`, as stated by who exported them" in words("native", "mit")
    assert "in a file LICENSE" in words("native", "other")
    assert "base model is not in here" in words("native") and "base model is in here" in words("baked")
    assert "under Apache-2.0" in words("diffusers", None, None, True)
