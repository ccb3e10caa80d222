"""Erased Stable Diffusion: a base model whose cross-attentions are distilled away from concepts.

The student predicts for a concept c what guidance away from it would give, ε(x_t, ∅) − η·(ε(x_t, c) − ε(x_t, ∅)) of the
frozen model. The authors take x_t from half-finished pictures of the student; here it is noised
pictures of the base model, which are drawn once.

It is a baseline: whoever asks gets the same picture.

Source: R. Gandikota et al., Erasing Concepts from Diffusion Models (ICCV 2023), equation 7, trained as ESD-x.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from psa_jax.diffusion.conditioning import TextConditions, encode_text, size_ids
from psa_jax.diffusion.generate import Generator
from psa_jax.diffusion.pixels import from_bytes
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.unet import AddedConditions, UNet
from psa_jax.progress import Progress
from psa_jax.seeds import check_seed


class Distillation(NamedTuple):
    """How the student is trained.

    Attributes:
      steps: of Adam.
      learning_rate: of Adam, constant.
      strength: η, how far beyond the unconditional prediction.
      batch_size: noisy pictures a step.
      pictures: drawn of each concept by the base model.
      sampler_steps: of those pictures.
      guidance: of those pictures.
      seed: of the pictures, noise and timesteps.
    """

    steps: int = 300
    learning_rate: float = 1e-5
    strength: float = 1.0
    batch_size: int = 8
    pictures: int = 8
    sampler_steps: int = 20
    guidance: float = 3.0
    seed: int = 0


def distil_concepts(model: StableDiffusion, concepts: Sequence[str], settings: Distillation) -> StableDiffusion:
    """The model with the cross-attentions of its UNet distilled away from concepts; everything else is shared.

    Args:
      model: the base model, with parameters in float32.
      concepts: texts, each drawn and erased as it stands.
      settings: of the distillation.

    Raises:
      PSAError: no concept, one that is longer than the text encoder reads, parameters of another type, or a loss that
        is not finite.
    """
    check_seed(settings.seed)
    if not concepts or any(model.truncated([*concepts])):
        raise PSAError("concepts: give at least one, none longer than the text encoder reads")
    if model.unet.conv_in.kernel.dtype != jnp.float32:
        raise PSAError("a model is distilled in float32; leave out --dtype")
    latents, which = _pictures(model, concepts, settings)
    absent = [False] * len(concepts) + [model.force_zeros_for_empty_prompt]
    text = _encoded(model, [*concepts, ""]).without(jnp.asarray(absent))
    schedule = NoiseSchedule.from_config(model.scheduler_config)
    graph, edited, kept = nnx.split(model.unet, lambda path, value: "attn2" in path, ...)
    transform = optax.adam(settings.learning_rate)
    size = model.picture_size

    @jax.jit
    def step(edited, state, frozen, text, latents, which, key):
        def loss(student):
            drawn = _draw(latents, which, schedule, settings.batch_size, key)
            noisy, timesteps, concept = drawn
            empty = jnp.full_like(concept, len(concepts))
            teacher = nnx.merge(graph, *frozen)
            about, nothing = (_predicted(teacher, noisy, timesteps, text, rows, size) for rows in (concept, empty))
            target = erased_target(about, nothing, settings.strength)
            mine = _predicted(nnx.merge(graph, student, frozen[1]), noisy, timesteps, text, concept, size)
            return jnp.mean((mine - jax.lax.stop_gradient(target)) ** 2)

        value, gradient = jax.value_and_grad(loss)(edited)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes Python floats and int32 counters
            updates, state = transform.update(gradient, state, edited)
        return optax.apply_updates(edited, updates), state, value

    student, state, key = edited, transform.init(edited), jax.random.key(settings.seed)
    with Progress(settings.steps, "step", "distilling") as progress:
        for number in range(settings.steps):
            now = jax.random.fold_in(key, number)
            student, state, value = step(student, state, (edited, kept), text, latents, which, now)
            progress.step()
    if settings.steps and not np.isfinite(value):
        raise PSAError(f"the distillation diverged (loss {value}); give a lower learning rate")
    return dataclasses.replace(model, unet=nnx.merge(graph, student, kept))


def erased_target(
    about: Float[Array, "b h w c"], nothing: Float[Array, "b h w c"], strength: float
) -> Float[Array, "b h w c"]:
    """ε(∅) − η·(ε(c) − ε(∅)).

    Args:
      about: the frozen model's prediction for the concept.
      nothing: its prediction for the empty prompt.
      strength: η.
    """
    return nothing - strength * (about - nothing)


def _pictures(
    model: StableDiffusion, concepts: Sequence[str], settings: Distillation
) -> tuple[Float[Array, "n h w c"], Int[Array, " n"]]:
    """Scaled latents of the base model's own pictures of every concept, and the number of each one's concept."""
    which = np.repeat(np.arange(len(concepts)), settings.pictures)
    generator = Generator(
        model, steps=settings.sampler_steps, guidance=settings.guidance, batch_size=min(16, len(which))
    )
    with Progress(len(which), "picture", "drawing what is to be erased") as progress:
        pictures = generator(
            [concepts[index] for index in which],
            [settings.seed + number for number in range(len(which))],
            on_batch=progress.step,
        )
    graph, params = nnx.split(model.vae)
    encode = jax.jit(lambda params, pixels: nnx.merge(graph, params).encode(pixels))
    means = [jnp.split(encode(params, from_bytes(picture[None])), 2, axis=-1)[0] for picture in pictures]
    return jnp.concatenate(means) * model.vae.config.scaling_factor, jnp.asarray(which)


def _encoded(model: StableDiffusion, texts: list[str]) -> TextConditions:
    graph, params = nnx.split(model.text_encoders)
    ids = tuple(jnp.asarray(each) for each in model.token_ids(texts))
    return jax.jit(lambda params, ids: encode_text(nnx.merge(graph, params), ids))(params, ids)


def _draw(
    latents: Float[Array, "n h w c"], which: Int[Array, " n"], schedule: NoiseSchedule, batch: int, key: PRNGKeyArray
) -> tuple[Float[Array, "b h w c"], Int[Array, " b"], Int[Array, " b"]]:
    """Noisy latents, their timesteps and their concepts."""
    row_key, noise_key, time_key = jax.random.split(key, 3)
    rows = jax.random.randint(row_key, (batch,), 0, len(latents))
    noise = jax.random.normal(noise_key, (batch, *latents.shape[1:]))
    timesteps = jax.random.randint(time_key, (batch,), 0, schedule.steps)
    return schedule.add_noise(latents[rows], noise, timesteps), timesteps, which[rows]


def _predicted(
    unet: UNet,
    noisy: Float[Array, "b h w c"],
    timesteps: Int[Array, " b"],
    text: PyTree[Array],
    rows: Int[Array, " b"],
    size: tuple[int, int],
) -> Float[Array, "b h w c"]:
    states, pooled = jax.tree.map(lambda leaf: leaf[rows], text)
    added = None if pooled is None else AddedConditions(pooled, size_ids(size, len(rows)))
    return unet(noisy, timesteps.astype(jnp.float32), unet.context(states), added)
