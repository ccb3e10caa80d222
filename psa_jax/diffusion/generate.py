"""From prompts, seeds and users to pictures: text, guidance, the sampler's loop and decoding in one jitted call."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree, UInt8

from psa_jax.diffusion.samplers import ddim, leading_timesteps
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.adapter import Adapter

UNCONDITIONAL = ("off", "zeros", "same")


def to_bytes(pixels: Float[np.ndarray, "*s"]) -> UInt8[np.ndarray, "*s"]:
    """[−1, 1] to bytes, clipped and rounded as diffusers does."""
    return (np.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255.0).round().astype(np.uint8)


def initial_latents(seeds: list[int], shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    """Standard normal latents, one key a seed, so that a picture does not depend on its batch."""
    return jnp.stack([jax.random.normal(jax.random.key(seed), shape) for seed in seeds])


def picture_grid(pictures: UInt8[np.ndarray, "n h w 3"], columns: int, gap: int = 2) -> UInt8[np.ndarray, "gh gw 3"]:
    """Pictures in rows of `columns` on white."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = picture
    return grid


class Generator:
    """Draws pictures with a base model and, if given, an adapter.

    Args:
      model: the base model.
      adapter: None draws with the base model alone.
      steps: sampler steps.
      guidance: classifier-free guidance w in ε_∅ + w·(ε − ε_∅).
      unconditional: what the adapter does on the ε_∅ side: "off", "zeros" (user embedding zeros), "same" (the user).
      size: height and width in pixels; None for the model's own.
      batch_size: prompts a call; a last smaller batch is padded, so there is one compilation.
    """

    def __init__(
        self,
        model: StableDiffusion,
        adapter: Adapter | None = None,
        *,
        steps: int = 20,
        guidance: float = 7.5,
        unconditional: str = "off",
        size: tuple[int, int] | None = None,
        batch_size: int = 32,
    ):
        if unconditional not in UNCONDITIONAL:
            raise PSAError(f"unconditional {unconditional!r} is unknown; use one of {', '.join(UNCONDITIONAL)}")
        factor = model.vae.config.downscale
        side = model.unet.config.sample_size * factor
        height, width = (side, side) if size is None else size
        multiple = factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
        if height % multiple or width % multiple or min(height, width) <= 0:
            raise PSAError(f"picture size {height}x{width}: both sides must be positive multiples of {multiple}")
        self._model, self._batch, self._guidance = model, batch_size, guidance
        self.latent_shape = (height // factor, width // factor, model.unet.config.in_channels)
        self.user_dim = None if adapter is None else adapter.config.user_dim
        schedule = NoiseSchedule.from_config(model.scheduler_config)
        timesteps = leading_timesteps(schedule, steps, model.scheduler_config.get("steps_offset", 0))
        graph, self._params = nnx.split((model.unet, model.vae, model.text_encoder, adapter))
        self._graph = graph
        # Weights and the schedule are arguments: closed over, they would become constants of the executable.
        self._schedule = schedule
        self._draw = jax.jit(functools.partial(_draw, graph=graph, timesteps=timesteps, unconditional=unconditional))

    def with_adapter(self, adapter: Adapter) -> "Generator":
        """The same generator with another adapter of the same configuration; nothing is compiled again."""
        other = copy.copy(self)
        graph, other._params = nnx.split((self._model.unet, self._model.vae, self._model.text_encoder, adapter))
        if graph != self._graph:
            raise PSAError(
                "the adapter has another configuration than the generator was made for; make a new Generator"
            )
        return other

    def __call__(
        self,
        prompts: list[str],
        seeds: list[int],
        users: Float[np.ndarray, "n d"] | None = None,
        *,
        negative: str = "",
        scale: float | Float[np.ndarray, " n"] = 1.0,
        latents: Float[np.ndarray, "n h w c"] | None = None,
    ) -> UInt8[np.ndarray, "n height width 3"]:
        """Pictures as bytes. See `pixels`."""
        return to_bytes(self.pixels(prompts, seeds, users, negative=negative, scale=scale, latents=latents))

    def pixels(
        self,
        prompts: list[str],
        seeds: list[int],
        users: Float[np.ndarray, "n d"] | None = None,
        *,
        negative: str = "",
        scale: float | Float[np.ndarray, " n"] = 1.0,
        latents: Float[np.ndarray, "n h w c"] | None = None,
    ) -> Float[np.ndarray, "n height width 3"]:
        """Pictures in [−1, 1], not clipped.

        Args:
          seeds: one a prompt; ignored where `latents` (x_T) are given.
          users: user embeddings, one a prompt: required exactly when there is an adapter.
          scale: strength s of the adapter, for all prompts or for each; 0 is the base model.
        """
        if (users is None) != (self.user_dim is None):
            raise PSAError("an adapter needs a user for every prompt, and users need an adapter: give both or neither")
        if users is not None and users.shape != (len(prompts), self.user_dim):
            raise PSAError(
                f"user embeddings have shape {users.shape}, the adapter needs ({len(prompts)}, {self.user_dim})"
            )
        if not prompts or len(seeds) != len(prompts):
            raise PSAError(
                f"{len(prompts)} prompts and {len(seeds)} seeds: give at least one prompt and a seed for each"
            )
        if np.shape(scale) not in ((), (len(prompts),)):
            raise PSAError(
                f"scale has shape {np.shape(scale)}: give one number or one for each of {len(prompts)} prompts"
            )
        if latents is not None and latents.shape != (len(prompts), *self.latent_shape):
            raise PSAError(f"latents have shape {latents.shape}, expected {(len(prompts), *self.latent_shape)}")
        scales = np.broadcast_to(np.asarray(scale, np.float32), (len(prompts),))
        ids, empty = self._model.tokenize(prompts), self._model.tokenize([negative])[0]
        pictures = []
        for start in range(0, len(prompts), self._batch):
            rows = np.arange(start, start + self._batch).clip(max=len(prompts) - 1)
            chosen = [seeds[i] for i in rows]
            noise = initial_latents(chosen, self.latent_shape) if latents is None else jnp.asarray(latents[rows])
            batch_users = None if users is None else jnp.asarray(users[rows], jnp.float32)
            drawn = self._draw(
                self._params, self._schedule, jnp.asarray(ids[rows]), jnp.asarray(empty), noise, batch_users,
                jnp.asarray(scales[rows]), jnp.float32(self._guidance),
            )  # fmt: skip
            pictures.append(np.asarray(drawn)[: len(prompts) - start])
        return np.concatenate(pictures)


def _draw(
    params: PyTree[Array],
    schedule: NoiseSchedule,
    ids: Int[Array, "b s"],
    empty: Int[Array, " s"],
    latents: Float[Array, "b h w c"],
    users: Float[Array, "b d"] | None,
    scale: Float[Array, " b"],
    guidance: Float[Array, ""],
    *,
    graph: nnx.GraphDef,
    timesteps: Int[np.ndarray, " n"],
    unconditional: str,
) -> Float[Array, "b height width 3"]:
    unet, vae, text_encoder, adapter = nnx.merge(graph, params)
    batch = ids.shape[0]
    # The unconditional half comes first, as in diffusers.
    both = jnp.concatenate([jnp.broadcast_to(empty[None, :], ids.shape), ids])
    text = text_encoder(both).last
    if adapter is None:
        contexts = unet.context(text)
    else:
        first_user = jnp.zeros_like(users) if unconditional == "zeros" else users
        first_scale = jnp.zeros_like(scale) if unconditional == "off" else scale
        contexts = adapter(unet, text, jnp.concatenate([first_user, users]), jnp.concatenate([first_scale, scale]))

    def predict(x, timestep):
        times = jnp.full((2 * batch,), timestep, jnp.float32)
        without, with_prompt = jnp.split(unet(jnp.concatenate([x, x]), times, contexts), 2)
        return without + guidance * (with_prompt - without)

    clean = ddim(predict, latents, schedule, timesteps)
    return vae.decode(clean / vae.config.scaling_factor)
