"""The adapter kinds against torch, and the promises that hold for all of them."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from flax import nnx
from support.torch_adapters import (
    adapted_unet,
    as_jax,
    cross_attention_names,
    file_tensors,
    prompt_states,
    random_adapter,
    untrained_adapter,
    user_tokens,
)
from support.torch_models import FAST_COMPILE, TOLERANCE, difference, nhwc, randomise, tensor, to_flax

from psa_jax.interop.native import adapter_arrays, adapter_shapes, with_arrays
from psa_jax.models.adapter import Adapter, AdapterParam, UserProjection
from psa_jax.models.adapter_config import ADAPTER_KINDS, AdapterConfig
from psa_jax.models.config import UNetConfig
from psa_jax.models.unet import UNet

USER_DIM = 11
LAYERS = 5
UNET = {  # one cross-attention down, two up, two in one transformer in the middle; two widths and head counts
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 20,
    "attention_head_dim": (2, 3),
    "norm_num_groups": 4,
}
ALL = [(kind, tokens) for kind in ADAPTER_KINDS for tokens in (1, 2, 4)]

# One function each, so that what has the same shapes is compiled once.
draw = jax.jit(lambda unet, *inputs: unet(*inputs), compiler_options=FAST_COMPILE)
base_contexts = jax.jit(lambda unet, text: unet.context(text), compiler_options=FAST_COMPILE)
contexts_of = jax.jit(lambda adapter, *inputs: adapter(*inputs), compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def unets(tmp_path_factory) -> tuple[UNet2DConditionModel, UNet]:
    theirs = randomise(UNet2DConditionModel(**UNET), seed=11)
    config = UNetConfig.from_json(dict(theirs.config))
    return theirs, to_flax(lambda r: UNet(config, rngs=r), theirs, tmp_path_factory.mktemp("adapter_unet"))


LATENTS, TEXT, USERS = tensor(2, 4, 6, 4), tensor(2, 5, 20, seed=1), tensor(2, USER_DIM, seed=2)
STEPS = torch.tensor([12, 805])
TIMES = jnp.asarray([12.0, 805.0])


def configure(unet: UNet, kind: str, tokens: int, qk_dim: int | None = None) -> AdapterConfig:
    return AdapterConfig.for_unet(unet.config, user_dim=USER_DIM, kind=kind, tokens=tokens, qk_dim=qk_dim)


def ours(unet: UNet, adapter: Adapter, scale: list[float], times: jax.Array = TIMES) -> np.ndarray:
    contexts = contexts_of(adapter, unet, as_jax(TEXT), as_jax(USERS), jnp.asarray(scale, jnp.float32))
    return np.asarray(draw(unet, nhwc(LATENTS), times, contexts))


def base(unet: UNet) -> np.ndarray:
    return np.asarray(draw(unet, nhwc(LATENTS), TIMES, base_contexts(unet, as_jax(TEXT))))


@pytest.mark.parametrize(("kind", "tokens"), ALL)
def test_an_untrained_adapter_changes_no_bit(unets, kind, tokens):
    _, unet = unets
    adapter = untrained_adapter(configure(unet, kind, tokens), seed=tokens)
    np.testing.assert_array_equal(ours(unet, adapter, [1.0, 7.5]), base(unet))


@pytest.mark.parametrize(("kind", "tokens"), ALL)
def test_parameters_and_their_types(unets, kind, tokens):
    _, unet = unets
    state = nnx.to_flat_state(nnx.state(untrained_adapter(configure(unet, kind, tokens))))
    assert {type(variable) for _, variable in state} == {AdapterParam}
    per_layer = {path[2] for path, _ in state if path[0] == "layers"}
    expected = {"to_v"} | {"prompt": {"to_out"}, "rewrite": {"hidden", "to_out"}}.get(kind, set())
    if kind == "edit":
        expected |= {"hidden", "hidden_bias", "to_out", "to_out_bias"}
    if tokens > 1:
        expected |= {"to_k"} | (set() if kind == "published" else {"to_q"})
    assert per_layer == expected
    assert len({path[1] for path, _ in state if path[0] == "layers"}) == (1 if kind in ("prompt", "edit") else LAYERS)
    # The matrix that speaks starts at zero, the others do not.
    silent = "to_out" if kind in ("prompt", "rewrite", "edit") else "to_v"
    for path, variable in state:
        if path[0] == "layers" and "bias" not in path[2]:
            assert (np.abs(variable[...]).max() == 0) == (path[2] == silent), path
        elif path[0] == "layers":
            assert np.abs(variable[...]).max() == 0, path


def test_no_parameter_of_the_unet_is_an_adapter_parameter(unets):
    assert not nnx.to_flat_state(nnx.state(unets[1], AdapterParam))


def test_with_one_token_the_kinds_are_the_same_constant(unets):
    theirs, unet = unets
    published = random_adapter(configure(unet, "published", 1), seed=5)
    arrays = adapter_arrays(published)
    outputs = [
        ours(unet, with_arrays(configure(unet, kind, 1), arrays), [0.5, 1.5])
        for kind in ("published", "text", "concept")
    ]
    # o + s·W_v z at every pixel: in torch, a bias of to_out for each user.
    tensors = file_tensors(published)
    z = user_tokens(tensors, USERS, 20)
    for row, s in enumerate((0.5, 1.5)):
        baked = copy.deepcopy(theirs)
        for index, name in enumerate(cross_attention_names(baked)):
            out = baked.get_submodule(name.removesuffix(".processor")).to_out[0]
            out.bias += s * out.weight @ tensors[f"psa_adapter.{index}.to_v_user.0.weight"] @ z[row, 0]
        expected = baked(LATENTS[row : row + 1], STEPS[row], encoder_hidden_states=TEXT[row : row + 1]).sample
        for output in outputs:
            assert difference(output[row : row + 1], expected) <= TOLERANCE
    assert np.abs(outputs[0] - base(unet)).max() > 0.1


def upstream_parameters(config: AdapterConfig) -> int:
    """Numbers in a file of upstream's layout: every array, and W_k, which one token does not need."""
    arrays = adapter_shapes(config)
    assert not any("to_k" in name for name in arrays)
    return sum(a.size for a in arrays.values()) + sum(width * config.cross_dim for width, _ in config.layers)


def test_parameter_count_of_stable_diffusion_1_5():
    config = AdapterConfig.for_unet(UNetConfig(), user_dim=3584, kind="published", tokens=1)
    assert len(config.layers) == 16
    assert upstream_parameters(config) == 21_924_096


def test_parameter_count_of_sdxl():
    unet = UNetConfig(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
    )
    small, large = (640, 10), (1280, 20)
    # Two stacks of 2 and of 10 on the way down, three of 10 and of 2 on the way up, one of 10 in the middle.
    layers = (small,) * 4 + (large,) * 20 + (large,) * 30 + (small,) * 6 + (large,) * 10
    assert unet.cross_attentions == layers
    assert len(layers) == 70
    assert upstream_parameters(AdapterConfig("published", 1, 3584, 2048, layers)) == 348_133_376

    # diffusers' own SDXL, with a thirty-second of its widths, places the same cross-attentions.
    shrunk = dataclasses.asdict(unet) | {"block_out_channels": (10, 20, 40), "norm_num_groups": 5}
    shrunk |= {"cross_attention_dim": 8}
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**shrunk)
    modules = [theirs.get_submodule(name.removesuffix(".processor")) for name in cross_attention_names(theirs)]
    assert tuple((32 * m.to_q.out_features, m.heads) for m in modules) == layers


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_published_is_the_ip_adapter_of_diffusers(unets, tokens):
    theirs, unet = unets
    adapter = random_adapter(configure(unet, "published", tokens), seed=tokens)
    tensors = file_tensors(adapter)
    z = user_tokens(tensors, USERS, 20)
    outputs = []
    for scale in (0.0, 0.37, 1.0):
        torch_unet = copy.deepcopy(theirs)
        processors = dict(torch_unet.attn_processors)
        for index, name in enumerate(cross_attention_names(torch_unet)):
            width = tensors[f"psa_adapter.{index}.to_v_user.0.weight"].shape[0]
            processor = IPAdapterAttnProcessor2_0(width, 20, num_tokens=(tokens,), scale=scale)
            # In a file for one token W_k is zeros; any other says the same.
            processor.to_k_ip[0].weight.copy_(tensors[f"psa_adapter.{index}.to_k_user.0.weight"])
            processor.to_v_ip[0].weight.copy_(tensors[f"psa_adapter.{index}.to_v_user.0.weight"])
            processors[name] = processor
        torch_unet.set_attn_processor(processors)
        expected = torch_unet(LATENTS, STEPS, encoder_hidden_states=(TEXT, [z])).sample
        outputs.append(ours(unet, adapter, [scale, scale]))
        assert difference(outputs[-1], expected) <= TOLERANCE
    np.testing.assert_array_equal(outputs[0], base(unet))
    assert np.abs(outputs[2] - outputs[0]).max() > 0.1


@pytest.mark.parametrize("qk_dim", [None, 12], ids=["full", "low_rank"])
@pytest.mark.parametrize("tokens", [2, 4])
@pytest.mark.parametrize("kind", ["text", "concept"])
def test_kinds_inside_the_unet_follow_their_formulas(unets, kind, tokens, qk_dim):
    theirs, unet = unets
    adapter = random_adapter(configure(unet, kind, tokens, qk_dim), seed=tokens)
    scale = [0.37, 1.0]  # its own for each sample
    expected = adapted_unet(theirs, adapter, USERS, torch.tensor(scale))(
        LATENTS, STEPS, encoder_hidden_states=TEXT
    ).sample
    output = ours(unet, adapter, scale)
    assert difference(output, expected) <= TOLERANCE
    assert np.abs(output - base(unet)).max() > 0.1


@pytest.mark.parametrize("kind", ["prompt", "edit"])
@pytest.mark.parametrize(("tokens", "qk_dim"), [(1, None), (2, None), (4, None), (4, 10)])
def test_the_kinds_before_the_unet_follow_their_formulas(unets, kind, tokens, qk_dim):
    theirs, unet = unets
    adapter = random_adapter(configure(unet, kind, tokens, qk_dim), seed=tokens)
    tensors, scale = file_tensors(adapter), torch.tensor([0.37, 1.0])
    z = user_tokens(tensors, USERS, 20)
    text = prompt_states(tensors, TEXT, z, scale[:, None, None], heads=5)  # the most, up to 8, that divide 20
    expected = theirs(LATENTS, STEPS, encoder_hidden_states=text).sample
    output = ours(unet, adapter, scale.tolist())
    assert difference(output, expected) <= TOLERANCE
    assert np.abs(output - base(unet)).max() > 0.01


def test_scale_is_per_sample(unets):
    _, unet = unets
    adapter = random_adapter(configure(unet, "text", 4))
    both = ours(unet, adapter, [0.0, 1.0])
    np.testing.assert_array_equal(both[0], base(unet)[0])
    np.testing.assert_array_equal(both[1], ours(unet, adapter, [1.0, 1.0])[1])


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_contexts_serve_every_timestep(unets, kind):
    theirs, unet = unets
    adapter = random_adapter(configure(unet, kind, 4))
    contexts = contexts_of(adapter, unet, as_jax(TEXT), as_jax(USERS), jnp.ones(2))
    if kind in ("prompt", "edit"):
        tensors = file_tensors(adapter)
        text = prompt_states(tensors, TEXT, user_tokens(tensors, USERS, 20), torch.ones(2, 1, 1), heads=5)
        torch_unet = theirs
    else:
        text, torch_unet = TEXT, adapted_unet(theirs, adapter, USERS, torch.ones(2))
    for steps in ([0, 0], [999, 500]):
        expected = torch_unet(LATENTS, torch.tensor(steps), encoder_hidden_states=text).sample
        got = draw(unet, nhwc(LATENTS), jnp.asarray(steps, jnp.float32), contexts)
        assert difference(got, expected) <= TOLERANCE


def test_known_text_contexts_are_used(unets):
    _, unet = unets
    adapter, text = random_adapter(configure(unet, "text", 2)), as_jax(TEXT)
    known = contexts_of(adapter, unet, text, as_jax(USERS), jnp.ones(2), base_contexts(unet, text))
    fresh = contexts_of(adapter, unet, text, as_jax(USERS), jnp.ones(2))
    for a, b in zip(known, fresh, strict=True):
        np.testing.assert_array_equal(a.key, b.key)
        np.testing.assert_allclose(a.value, b.value, rtol=0, atol=1e-6)


def test_user_tokens_with_a_large_mean(unets):
    """The LayerNorm keeps its digits where tokens have a mean far from zero."""
    adapter = random_adapter(configure(unets[1], "text", 4))
    adapter.user_proj.bias[...] += 300.0
    z = jax.jit(UserProjection.__call__)(adapter.user_proj, as_jax(USERS))
    expected = user_tokens({k: t.double() for k, t in file_tensors(adapter).items()}, USERS.double(), 20)
    np.testing.assert_allclose(z, expected.numpy(), rtol=0, atol=5e-4)  # float32 has 3e-5 at 300


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "loud"}, "'loud' is unknown (one of published, text, concept, prompt, rewrite, edit)"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"qk_dim": 4}, "qk_dim 4"),  # not for three heads
        ({"qk_dim": 0}, "qk_dim 0"),
        ({"qk_dim": -6}, "qk_dim -6"),
        ({"kind": "prompt", "qk_dim": 6}, "qk_dim 6"),  # a width of 20 has five heads
        ({"kind": "published", "qk_dim": 6}, "does not apply to the published kind"),
        ({"hidden": 8}, "adapter.hidden is 8, which does not apply to the text kind: only rewrite, edit have"),
        ({"kind": "rewrite", "hidden": 0}, "hidden must be at least 1, got 0"),
    ],
)
def test_bad_configs_are_refused(change, says):
    good = {"kind": "text", "tokens": 4, "user_dim": 3, "cross_dim": 20, "layers": ((16, 2), (24, 3)), "qk_dim": 6}
    AdapterConfig(**good)
    with pytest.raises(ValueError) as caught:
        AdapterConfig(**good | change)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
