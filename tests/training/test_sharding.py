"""Where arrays live: meshes, the table of rules, and what a device then holds."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.training.sharding import array_name, check_batch, make_mesh, placement, shardings, weight_sharding


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(1, 1, (1, 1)), (-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, 2, (2, 2)), (1, 8, (1, 8))]
)
def test_meshes(data, fsdp, shape):
    mesh = make_mesh(data, fsdp)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape


@pytest.mark.parametrize(
    ("data", "fsdp", "message"),
    [
        (99, 1, "mesh.data = 99, mesh.fsdp = 1: there are 8 devices"),
        (4, 4, "mesh.data = 4, mesh.fsdp = 4: there are 8 devices"),
        (0, 1, "mesh.data = 0"),
        (-1, 3, "8 devices cannot be divided"),
        (1, 0, "mesh.fsdp = 0"),
    ],
)
def test_meshes_that_cannot_be_made(data, fsdp, message):
    with pytest.raises(PSAError, match=message):
        make_mesh(data, fsdp)


def test_batches_that_cannot_be_divided():
    check_batch(32, make_mesh(2, 2), 8)
    for pairs, parts in ((12, 2), (4, 2), (0, 1), (8, 0)):
        with pytest.raises(PSAError, match=f"batch_size = {pairs} cannot be divided"):
            check_batch(pairs, make_mesh(2, 2), parts)


@pytest.mark.parametrize(
    ("name", "shape", "frozen", "spec"),
    [
        ("weights/0/conv_in/kernel", (3, 3, 4, 320), "replicated", ()),
        ("weights/0/conv_in/kernel", (3, 3, 4, 320), "split", (None, None, None, "fsdp")),
        ("weights/0/down_blocks/0/resnets/0/conv2/kernel", (3, 3, 640, 320), "split", (None, None, "fsdp", None)),
        ("weights/0/mid_block/attentions/0/proj_in/kernel", (1280, 1280), "split", ("fsdp", None)),
        ("weights/1/0/embeddings/token_embedding/embedding", (49408, 768), "split", ("fsdp", None)),
        ("weights/1/0/embeddings/position_embedding/embedding", (77, 768), "split", (None, "fsdp")),
        ("weights/0/conv_out/kernel", (3, 3, 5, 7), "split", ()),  # nothing that four devices could share
        ("weights/0/conv_norm_out/scale", (320,), "split", ()),
        ("weights/0/mid_block/attentions/0/transformer_blocks/norm1/bias", (4, 1280), "split", ()),
        ("schedule/alphas_cumprod", (1000,), "split", ()),
        ("params/psa_adapter.0.to_v_user.0.weight", (768, 320), "replicated", ("fsdp", None)),
        ("opt_state/1/0/mu/psa_adapter.0.to_v_user.0.weight", (768, 320), "replicated", ("fsdp", None)),
        ("ema/user_proj.proj.weight", (35, 3072), "replicated", (None, "fsdp")),
        ("params/user_proj.norm.bias", (768,), "replicated", ()),
        ("step", (), "replicated", ()),
    ],
)
def test_table(name, shape, frozen, spec):
    assert placement(name, shape, make_mesh(2, 4), frozen).spec == PartitionSpec(*spec)


def test_a_model_is_read_in_parts(small_pipeline):
    """Each device holds about a quarter, under the same names as in the step, and the values are those of the files."""
    mesh = make_mesh(2, 4)
    whole = small_pipeline[1]
    parts = load_stable_diffusion(whole.folder, sharding=weight_sharding(mesh, "split"))
    wanted = jax.tree.leaves_with_path(whole.unet)
    total = held = 0
    for (path, value), part in zip(wanted, jax.tree.leaves(parts.unet), strict=True):
        np.testing.assert_array_equal(part, value)
        assert part.sharding == placement(array_name(path), value.shape, mesh, "split"), array_name(path)
        total, held = total + value.nbytes, held + part.addressable_shards[0].data.nbytes
    assert 0.25 <= held / total < 0.35


@pytest.mark.slow
def test_moments_lie_beside_their_parameters(make_training):
    training = make_training(1, 4)
    adam = training.state.opt_state[0]
    for name, value in training.state.params.items():
        assert adam.mu[name].sharding == adam.nu[name].sharding == value.sharding
    assert any("fsdp" in value.sharding.spec for value in training.state.params.values())
    state = training.run(1)[1]
    assert jax.tree.map(lambda x: x.sharding, state) == shardings(state, make_mesh(1, 4))
