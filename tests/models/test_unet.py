"""The UNet and its modules against diffusers' torch modules with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock as TorchBlock
from diffusers.models.attention import FeedForward as TorchFeedForward
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from flax import nnx
from support.torch_models import (
    TOLERANCE,
    UNET_SIZES,
    UNETS,
    difference,
    flax_added,
    nhwc,
    randomise,
    run,
    tensor,
    to_flax,
    torch_added,
    torch_unet,
)

from psa_jax.errors import PSAError
from psa_jax.interop.weights import abstract_model
from psa_jax.models.attention import Attention, BasicTransformerBlock, ComputeOptions, FeedForward, Transformer2D
from psa_jax.models.config import UNetConfig
from psa_jax.models.resnet import Downsample, ResnetBlock, Upsample
from psa_jax.models.unet import AddedConditions, TimestepMLP, UNet, timestep_embedding


@pytest.mark.parametrize(("cin", "cout", "time_dim"), [(12, 12, 20), (8, 12, 20), (12, 8, None)])
def test_resnet_block(cin, cout, time_dim, tmp_path):
    theirs = randomise(
        ResnetBlock2D(in_channels=cin, out_channels=cout, temb_channels=time_dim, groups=4, eps=1e-5), seed=1
    )
    ours = to_flax(lambda r: ResnetBlock(cin, cout, time_dim, groups=4, eps=1e-5, rngs=r), theirs, tmp_path)
    x, time = tensor(2, cin, 5, 7), None if time_dim is None else tensor(2, time_dim, seed=1)
    got = run(lambda m, *a: m(*a), ours, nhwc(x), None if time is None else jnp.asarray(time.numpy()))
    assert difference(got, theirs(x, time)) <= TOLERANCE


@pytest.mark.parametrize(("dim", "heads", "context_dim"), [(12, 3, None), (12, 1, 20), (16, 8, 5)])
def test_attention(dim, heads, context_dim, tmp_path):
    theirs = randomise(TorchAttention(dim, cross_attention_dim=context_dim, heads=heads, dim_head=dim // heads), seed=2)
    ours = to_flax(lambda r: Attention(dim, heads, context_dim, rngs=r), theirs, tmp_path)
    x = tensor(2, 9, dim)
    if context_dim is None:
        got, expected = run(lambda m, x: m(x), ours, jnp.asarray(x.numpy())), theirs(x)
    else:
        text = tensor(2, 4, context_dim, seed=1)
        got = run(lambda m, x, t: m(x, m.context(t)), ours, jnp.asarray(x.numpy()), jnp.asarray(text.numpy()))
        expected = theirs(x, encoder_hidden_states=text)
    assert difference(got, expected) <= TOLERANCE


def test_feed_forward(tmp_path):
    theirs = randomise(TorchFeedForward(12, activation_fn="geglu"), seed=3)
    ours = to_flax(lambda r: FeedForward(12, rngs=r), theirs, tmp_path)
    x = 3 * tensor(2, 9, 12)  # wide enough for the exact and the approximate GELU to differ
    assert difference(run(lambda m, x: m(x), ours, jnp.asarray(x.numpy())), theirs(x)) <= TOLERANCE


def test_transformer_block(tmp_path):
    theirs = randomise(TorchBlock(12, 3, 4, cross_attention_dim=10), seed=4)
    ours = to_flax(lambda r: BasicTransformerBlock(12, 3, 10, rngs=r), theirs, tmp_path)
    x, text = tensor(2, 9, 12), tensor(2, 5, 10, seed=1)
    got = run(lambda m, x, t: m(x, m.attn2.context(t)), ours, jnp.asarray(x.numpy()), jnp.asarray(text.numpy()))
    assert difference(got, theirs(x, encoder_hidden_states=text)) <= TOLERANCE


@pytest.mark.parametrize(("linear", "depth"), [(False, 1), (True, 1), (False, 2), (True, 3)])
def test_transformer_2d(linear, depth, tmp_path):
    theirs = randomise(
        Transformer2DModel(
            num_attention_heads=2,
            attention_head_dim=6,
            in_channels=12,
            num_layers=depth,
            cross_attention_dim=10,
            norm_num_groups=4,
            use_linear_projection=linear,
        ),
        seed=5,
    )
    ours = to_flax(lambda r: Transformer2D(12, 2, 10, depth, groups=4, linear=linear, rngs=r), theirs, tmp_path)
    x, text = tensor(2, 12, 3, 5), tensor(2, 7, 10, seed=1)
    expected = theirs(x, encoder_hidden_states=text, return_dict=False)[0]
    given = (ours, nhwc(x), jnp.asarray(text.numpy()))
    got = run(lambda m, x, t: m(x, m.context(t, ComputeOptions()), ComputeOptions()), *given)
    assert difference(got, expected) <= TOLERANCE
    compute = ComputeOptions("full")
    got = run(lambda m, x, t: m(x, m.context(t, compute), compute, m.start(x, compute)), *given)
    assert difference(got, expected) <= TOLERANCE


@pytest.mark.parametrize("policy", ["none", "projections", "full"])
def test_gathered_weights_are_not_kept_for_the_backward_pass(capsys, policy):
    """Of a stack's start, its keys and values, and its blocks."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    compute = ComputeOptions(policy, whole=lambda weight: jax.lax.with_sharding_constraint(weight, one))
    stack = Transformer2D(12, 2, 10, 2, groups=4, linear=True, rngs=nnx.Rngs(0))

    def run(x, text):
        return jnp.sum(stack(x, stack.context(text, compute), compute, stack.start(x, compute)))

    jax.ad_checkpoint.print_saved_residuals(run, jnp.ones((2, 3, 5, 12)), jnp.ones((2, 7, 10)))
    kept = capsys.readouterr().out
    assert kept and "sharding_constraint" not in kept and "optimization_barrier" not in kept


def test_deeper_stacks_are_no_more_to_compile():
    def products(depth: int) -> int:
        model = abstract_model(lambda _, rngs: Transformer2D(12, 2, 10, depth, groups=4, linear=True, rngs=rngs), None)
        x, text = jax.ShapeDtypeStruct((2, 3, 5, 12), jnp.float32), jax.ShapeDtypeStruct((2, 7, 10), jnp.float32)
        return (
            jax.jit(lambda m, x, t: m(x, m.context(t, ComputeOptions()), ComputeOptions()))
            .lower(model, x, text)
            .as_text()
            .count("dot_general")
        )

    # Two projections around the stack; in a block ten of weights and twice two of attention.
    assert products(1) == products(2) == products(10) == 16


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_downsample(asymmetric, size, tmp_path):
    theirs = randomise(Downsample2D(6, use_conv=True, padding=0 if asymmetric else 1, name="op"), seed=6)
    ours = to_flax(lambda r: Downsample(6, asymmetric=asymmetric, rngs=r), theirs, tmp_path)
    x = tensor(2, 6, *size)
    assert difference(run(lambda m, x: m(x), ours, nhwc(x)), theirs(x)) <= TOLERANCE


@pytest.mark.parametrize("size", [None, (5, 8), (5, 7)])
def test_upsample(size, tmp_path):
    theirs = randomise(Upsample2D(6, use_conv=True), seed=7)
    ours = to_flax(lambda r: Upsample(6, rngs=r), theirs, tmp_path)
    x = tensor(2, 6, 3, 4)
    assert difference(run(lambda m, x: m(x, size), ours, nhwc(x)), theirs(x, output_size=size)) <= TOLERANCE


@pytest.mark.parametrize("dim", [16, 320])
def test_timestep_embedding(dim):
    steps = torch.tensor([0.0, 1.0, 37.0, 500.0, 999.0])
    expected = get_timestep_embedding(steps, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    got = timestep_embedding(jnp.asarray(steps.numpy()), dim)
    assert difference(got, expected) <= TOLERANCE


def test_timestep_mlp(tmp_path):
    theirs = randomise(TimestepEmbedding(8, 32), seed=8)
    ours = to_flax(lambda r: TimestepMLP(8, 32, rngs=r), theirs, tmp_path)
    x = tensor(3, 8)
    assert difference(run(lambda m, x: m(x), ours, jnp.asarray(x.numpy())), theirs(x)) <= TOLERANCE


@pytest.fixture(scope="session", params=UNETS)
def unets(request, tmp_path_factory):
    theirs = torch_unet(request.param)
    config = UNetConfig.from_json(dict(theirs.config))
    ours = to_flax(lambda r: UNet(config, rngs=r), theirs, tmp_path_factory.mktemp("unet"))
    return request.param, theirs, ours


def test_unet(unets):
    name, theirs, ours = unets
    latents = tensor(2, theirs.config.in_channels, *UNET_SIZES[name])
    text = tensor(2, 6, theirs.config.cross_attention_dim, seed=1)
    steps = torch.tensor([3, 871])
    added = torch_added(theirs)
    expected = theirs(latents, steps, encoder_hidden_states=text, added_cond_kwargs=added).sample
    got = run(
        lambda m, x, t, c, a: m(x, t, m.context(c), a),
        ours,
        nhwc(latents),
        jnp.asarray(steps.numpy(), dtype=jnp.float32),
        jnp.asarray(text.numpy()),
        flax_added(added),
    )
    assert difference(got, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "added", "says"),
    [
        ("sdxl_shape", None, "needs added conditions"),
        ("sdxl_shape", (24, 5), "54 numbers together"),
        ("mid_only", (24, 6), "takes no added conditions"),
    ],
)
def test_added_conditions_that_do_not_fit_are_refused(name, added, says):
    config = UNetConfig(**UNETS[name])
    inputs = (
        jnp.zeros((2, 8, 8, config.in_channels)),
        jnp.zeros(2),
        jnp.zeros((2, 6, config.cross_attention_dim)),
        added and AddedConditions(jnp.zeros((2, added[0])), jnp.zeros((2, added[1]))),
    )
    with pytest.raises(PSAError) as caught:
        jax.eval_shape(lambda m, x, t, c, a: m(x, t, m.context(c), a), abstract_model(UNet, config), *inputs)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contexts_come_in_the_order_of_attn_processors(unets):
    _, theirs, ours = unets
    names = [name.removesuffix(".processor") for name in theirs.attn_processors if "attn2" in name]
    layers = [theirs.get_submodule(name) for name in names]
    assert [name.split("_")[0] for name in names] == sorted((n.split("_")[0] for n in names), key="down up mid".find)
    assert ours.config.cross_attentions == tuple((layer.to_q.out_features, layer.heads) for layer in layers)

    text = tensor(2, 6, theirs.config.cross_attention_dim)
    contexts = ours.context(jnp.asarray(text.numpy()))
    for name, layer, context in zip(names, layers, contexts, strict=True):
        np.testing.assert_allclose(context.key, layer.to_k(text).numpy(), atol=TOLERANCE, err_msg=name)
        np.testing.assert_allclose(context.value, layer.to_v(text).numpy(), atol=TOLERANCE, err_msg=name)


def test_cross_attention_order_at_full_size():
    widths = [width for width, _ in UNetConfig().cross_attentions]
    assert widths == [320] * 2 + [640] * 2 + [1280] * 2 + [1280] * 3 + [640] * 3 + [320] * 3 + [1280]
    assert {heads for _, heads in UNetConfig().cross_attentions} == {8}
