"""Where arrays live: meshes, the table of rules, and what a device then holds."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.training.sharding import (
    array_name,
    check_batch,
    make_mesh,
    placement,
    shardings,
    slices_of,
    weight_sharding,
)


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


class Device(NamedTuple):
    """A device as far as slices are concerned."""

    id: int
    platform: str
    slice_index: int = 0


def test_matrices_are_divided_inside_a_slice():
    """Eight CPU devices as two slices of four: {0, 1, 2, 3} and {4, 5, 6, 7}."""
    mesh = make_mesh(-1, 2, slices=2)
    assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == (4, 2)
    ids = np.vectorize(lambda device: device.id)(mesh.devices) - min(device.id for device in jax.devices())
    for row, pair in enumerate(ids):
        assert {place // 4 for place in pair} == {row // 2}
    assert make_mesh(-1, 1, slices=2).devices.shape == make_mesh(8, 1, slices=2).devices.shape == (8, 1)
    assert make_mesh(-1, 4, slices=2).devices.shape == (2, 4)


def test_slices_that_tpus_say():
    mixed = [Device(id, "tpu", slice_index=id % 2) for id in range(8)]
    assert [[device.id for device in group] for group in slices_of(mixed, 2)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    with pytest.raises(PSAError, match="mesh.slices = 1: the devices are of 2; give mesh.slices = 2"):
        slices_of(mixed, 1)
    with pytest.raises(PSAError, match="mesh.slices = 4: the devices are of 2; give mesh.slices = 2"):
        slices_of(mixed, 4)
    with pytest.raises(PSAError, match="have 4, 3 devices; all need equally many"):
        slices_of(mixed[:7], 2)
    # A GPU's host calls itself a slice: one is what there was before.
    hosts = [Device(id, "gpu", slice_index=id // 4) for id in range(8)]
    assert slices_of(hosts, 1) == [hosts] and [len(group) for group in slices_of(hosts, 2)] == [4, 4]


@pytest.mark.parametrize(
    ("data", "fsdp", "slices", "message"),
    [
        (-1, 8, 2, "each slice has 4 devices"),
        (2, 2, 2, "all of which are used"),
        (-1, 1, 3, "the slices have 3, 3, 2 devices"),
        (-1, 1, 16, "mesh.slices = 16: the devices are of 8; give mesh.slices = 8"),
    ],
)
def test_slices_that_do_not_fit(data, fsdp, slices, message):
    with pytest.raises(PSAError, match=message):
        make_mesh(data, fsdp, slices=slices)


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
