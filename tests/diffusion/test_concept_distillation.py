"""Erased Stable Diffusion: its target against the authors' formula, and what a student of the tiny model forgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from psa_jax.diffusion.concept_distillation import Distillation, distil_concepts, erased_target
from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError


def test_target_is_the_authors_one():
    """`e_0 - negative_guidance * (e_n - e_0)`, with predictions of torch."""
    e_n, e_0 = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 3, 3, 4)
    wanted = e_0 - 1.5 * (e_n - e_0)
    got = erased_target(jnp.asarray(e_n.numpy()), jnp.asarray(e_0.numpy()), 1.5)
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-6)


def test_a_student_moves_towards_its_target_and_nowhere_else(smallest_pipeline):
    model = smallest_pipeline[1]
    settings = Distillation(steps=40, learning_rate=3e-3, batch_size=4, pictures=2, sampler_steps=2)
    erased = distil_concepts(model, ["a cat"], settings)
    before, changed = dict(nnx.to_flat_state(nnx.state(model.unet))), set()
    for path, leaf in nnx.to_flat_state(nnx.state(erased.unet)):
        if not np.array_equal(leaf[...], before[path][...]):
            changed.add(path)
    assert changed and all("attn2" in path for path in changed)
    assert {name for path in changed for name in path if str(name).startswith("to_")} >= {"to_q", "to_k", "to_v"}
    assert erased.vae is model.vae and erased.text_encoders == model.text_encoders

    # Beside noise the student never saw: nearer to the target than the frozen model is.
    noisy = jax.random.normal(jax.random.key(9), (4, *Generator(model, steps=1).latent_shape))
    from psa_jax.diffusion.concept_distillation import _encoded, _predicted

    text, times = _encoded(model, ["a cat", ""]), jnp.asarray([100, 300, 500, 900])

    def predicted(unet, row):
        return _predicted(unet, noisy, times, text, jnp.full((4,), row), model.picture_size)

    target = erased_target(predicted(model.unet, 0), predicted(model.unet, 1), 1.0)
    apart = [float(jnp.mean((predicted(each.unet, 0) - target) ** 2)) for each in (model, erased)]
    assert apart[1] < 0.7 * apart[0]


def test_same_seed_same_student(smallest_pipeline):
    model = smallest_pipeline[1]
    settings = Distillation(steps=2, pictures=1, batch_size=2, sampler_steps=1)
    first, again, other = (
        nnx.state(distil_concepts(model, ["a cat"], each).unet)
        for each in (settings, settings, settings._replace(seed=1))
    )
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), first, again)
    assert all(jax.tree.leaves(same))
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), first, other)))


def test_refusals(smallest_pipeline):
    model = smallest_pipeline[1]
    with pytest.raises(PSAError, match="give at least one"):
        distil_concepts(model, [], Distillation())
    with pytest.raises(PSAError, match="none longer than the text encoder reads"):
        distil_concepts(model, ["cat " * 100], Distillation())
    with pytest.raises(PSAError, match="diverged"):
        distil_concepts(model, ["a cat"], Distillation(steps=3, learning_rate=1e30, pictures=1, sampler_steps=1))
