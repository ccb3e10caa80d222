"""Generation of pictures from prompts, seeds and users: text, guidance, sampler and decoding in one jitted call."""

import copy
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from psa_jax.diffusion.conditioning import encode_text, size_ids
from psa_jax.diffusion.pixels import to_bytes
from psa_jax.diffusion.safe_latent_diffusion import guide_safely, no_memory
from psa_jax.diffusion.samplers import Sampler, guide, sample
from psa_jax.diffusion.scheduler_config import sampler_from_config
from psa_jax.diffusion.sld_strengths import CONCEPT, STRENGTHS, Strength
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import UNCONDITIONAL
from psa_jax.models.attention import Attend, ComputeOptions
from psa_jax.models.fused_attention import devices_of, fused_attention
from psa_jax.models.unet import AddedConditions
from psa_jax.seeds import PICTURE_BITS, check_seed, seed_words

_log = logging.getLogger(__name__)
_Shape = jax.ShapeDtypeStruct


def picture_keys(seeds: list[int]) -> Key[Array, " b"]:
    """A random key for each seed; different seeds give different keys.

    Args:
      seeds: whole numbers from 0 to 2^64 − 1.

    Raises:
      PSAError: a seed outside that range.
    """
    words = np.asarray([seed_words(seed) for seed in seeds], np.uint32)
    # The generator is named: JAX's default can be changed, and a seed must give the same noise everywhere.
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def truncation(what: str, prompt: str, length: int, lost: str) -> str:
    """Warning about a prompt that is too long, in diffusers' words.

    Args:
      what: "prompt" or "negative prompt".
      prompt: the whole text.
      length: tokens of the text encoder.
      lost: the truncated part.
    """
    known = f"{what} {prompt[:40] + ('…' if len(prompt) > 40 else '')!r}"
    because = f"CLIP can only handle sequences up to {length} tokens"
    return f"{known}: the following part of your input was truncated because {because}: {lost}"


def initial_latents(seeds: list[int], shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    """Standard normal latents of shape (height, width, channels), one key a seed: no picture depends on its batch.

    Raises:
      PSAError: as `picture_keys`.
    """
    return jnp.stack([jax.random.normal(key, shape) for key in picture_keys(seeds)])


class Generator:
    """Picture generator: a base model and, optionally, an adapter, compiled once.

    Args:
      model: the base model, of any family. Its UNet and text encoders run in the type of their parameters, the VAE and
        the sampler in float32 (SDXL's VAE overflows in float16).
      adapter: None for the base model alone.
      steps: sampler steps.
      guidance: classifier-free guidance w in ε_∅ + w·(ε − ε_∅). 1 or less skips the unconditional side, as in
        diffusers (turbo models use 0).
      rescale: φ of guidance rescale (`samplers.guide`).
      sampler: a name of `sampler_registry.SAMPLERS`; None for the folder's own.
      eta: DDIM's η.
      karras: Karras' noise levels; None for the folder's setting.
      unconditional: adapter on the ε_∅ side: "off", "zeros" (an embedding of zeros), "same" (the user's embedding).
      size: height and width in pixels; None for the model's own.
      batch_size: prompts a call. The last batch is padded, so that one compilation serves all.
      sld: strength of Safe Latent Diffusion (`sld_strengths.STRENGTHS`), for the base model alone; None: without.
      devices: where it runs; None for those that hold the weights. Weights that are shapes need it, for `lower`.

    Attributes:
      size: height and width of pictures in pixels.
      latent_shape: height, width and channels of one picture's latents.
      user_dim: length of a user embedding; None without an adapter.
      guided: whether there is an unconditional side.

    Raises:
      PSAError: an unknown option, a size that the VAE cannot make, or settings that the sampler does not support.
    """

    def __init__(
        self,
        model: StableDiffusion,
        adapter: Adapter | None = None,
        *,
        steps: int = 20,
        guidance: float = 7.5,
        rescale: float = 0.0,
        sampler: str | None = None,
        eta: float = 0.0,
        karras: bool | None = None,
        unconditional: str = "off",
        size: tuple[int, int] | None = None,
        batch_size: int = 32,
        sld: str | None = None,
        devices: Mesh | None = None,
    ):
        if batch_size < 1:
            raise PSAError(f"batch size {batch_size}: give a number from 1 up")
        if unconditional not in UNCONDITIONAL:
            raise PSAError(f"unconditional {unconditional!r} is unknown; use one of {', '.join(UNCONDITIONAL)}")
        if sld is not None:
            _check_sld(sld, adapter, guidance)
        factor = model.vae.config.downscale
        height, width = model.picture_size if size is None else size
        if height % factor or width % factor or min(height, width) <= 0:
            raise PSAError(f"picture size {height}x{width}: both sides must be positive multiples of {factor}")
        self._model, self._batch, self.size = model, batch_size, (height, width)
        self.latent_shape = (height // factor, width // factor, model.unet.config.in_channels)
        self.user_dim = None if adapter is None else adapter.config.user_dim
        # Weights and sampler are arguments of the jitted function: closed over, they would be compiled in as constants.
        self._sampler = sampler_from_config(
            model.scheduler_config, steps, sampler, eta=eta, karras=karras, where=f"{model.folder}: scheduler"
        )
        self._guidance, self.guided = (jnp.float32(guidance), jnp.float32(rescale)), guidance > 1.0
        self._safe = sld is not None
        self._told: set[str] = set()
        self._devices = devices_of(model.unet.conv_in.kernel[...]) if devices is None else devices
        vae = jax.tree.map(_as_float32, model.vae)
        self._parts = (model.unet, vae, model.text_encoders)
        self._graph, self._params = nnx.split((*self._parts, adapter))
        self._generate = jax.jit(
            functools.partial(
                _generate,
                graph=self._graph,
                attend=fused_attention(self._devices, PartitionSpec()),
                size=(height, width),
                guided=self.guided,
                unconditional=unconditional,
                strength=None if sld is None else STRENGTHS[sld],
            )
        )

    def lower(self) -> Lowered:
        """Lowers the program of a batch from shapes alone: neither weights nor devices need be here."""
        whole, rows = NamedSharding(self._devices, PartitionSpec()), self._batch
        ids = tuple(
            _Shape((rows, each.config.max_position_embeddings), jnp.int32) for each in self._model.text_encoders
        )
        inputs = (
            ids,
            ids,
            ids if self._safe else None,
            _Shape((rows,), jnp.bool_),
            _Shape((rows, *self.latent_shape), jnp.float32),
            jax.eval_shape(lambda: picture_keys([0] * rows)),
            None if self.user_dim is None else _Shape((rows, self.user_dim), jnp.float32),
            _Shape((rows,), jnp.float32),
            self._guidance,
        )
        params, inputs = jax.tree.map(
            lambda leaf: _Shape(leaf.shape, leaf.dtype, sharding=whole), (self._params, inputs)
        )
        return self._generate.lower(params, self._sampler, *inputs)

    def with_adapter(self, adapter: Adapter) -> "Generator":
        """The same generator with another adapter of the same configuration, without a new compilation.

        Raises:
          PSAError: another configuration, or a generator without an adapter.
        """
        other = copy.copy(self)
        graph, other._params = nnx.split((*self._parts, adapter))
        if graph != self._graph:
            raise PSAError(
                "the adapter has another configuration than the generator was made for; make a new Generator"
            )
        return other

    def with_guidance(self, guidance: float, rescale: float = 0.0) -> "Generator":
        """The same generator with another guidance, without a new compilation.

        Args:
          guidance, rescale: as for a new one.

        Raises:
          PSAError: one of the two guidances is above 1 and the other is not, which is another program.
        """
        if (guidance > 1.0) != self.guided:
            raise PSAError(f"guidance {guidance}: with or without guidance is another program; make a new Generator")
        other = copy.copy(self)
        other._guidance = jnp.float32(guidance), jnp.float32(rescale)
        return other

    def __call__(
        self,
        prompts: list[str],
        seeds: list[int],
        users: Float[np.ndarray, "n d"] | None = None,
        *,
        negative: str | list[str | None] | None = None,
        scale: float | Float[np.ndarray, " n"] = 1.0,
        latents: Float[np.ndarray, "n h w c"] | None = None,
        concept: str | list[str] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> UInt8[np.ndarray, "n height width 3"]:
        """Pictures as bytes; arguments and errors as `pixels`.

        Raises:
          PSAError: also a picture that is not finite.
        """
        options = {"negative": negative, "scale": scale, "latents": latents, "concept": concept, "on_batch": on_batch}
        return to_bytes(self.pixels(prompts, seeds, users, **options))

    def pixels(
        self,
        prompts: list[str],
        seeds: list[int],
        users: Float[np.ndarray, "n d"] | None = None,
        *,
        negative: str | list[str | None] | None = None,
        scale: float | Float[np.ndarray, " n"] = 1.0,
        latents: Float[np.ndarray, "n h w c"] | None = None,
        concept: str | list[str] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Float[np.ndarray, "n height width 3"]:
        """Pictures as pixels in [−1, 1], not clipped.

        Args:
          prompts: one a picture.
          seeds: one a picture, 0 to 2^64 − 1: of the initial noise (unless `latents` are given) and of a stochastic
            sampler's noise.
          users: user embeddings, one a picture. Required with an adapter, and not allowed without one.
          negative: negative prompt, for all pictures or one for each. None is "", or zeros in place of text states
            where SDXL's folder says so.
          scale: strength s of the adapter, for all pictures or for each; 0 is the base model.
          latents: standard normal noise in place of the seeds'.
          concept: what Safe Latent Diffusion leads away from, in words, for all pictures or one for each; None is its
            authors' (`sld_strengths.CONCEPT`).
          on_batch: called after every batch with the number of its pictures.

        Returns:
          Pictures in the order of the prompts.

        Raises:
          PSAError: no prompt, or arguments whose lengths or shapes do not match the prompts or the adapter.
        """
        count = len(prompts)
        self._check(prompts, seeds, users, scale, latents)
        negatives = negative if isinstance(negative, list) else [negative] * count
        if len(negatives) != count:
            raise PSAError(f"{len(negatives)} negative prompts for {count} prompts: give one, or one for each")
        concepts = self._concepts(concept, count)
        zeros = np.array([n is None and self._model.force_zeros_for_empty_prompt for n in negatives])
        for line in self.truncated([*prompts, *(n for n in negatives if n), *concepts]):
            _log.warning(line)
        scales = np.broadcast_to(np.asarray(scale, np.float32), (count,))
        ids, negative_ids = self._model.token_ids(prompts), self._model.token_ids([n or "" for n in negatives])
        concept_ids = self._model.token_ids(concepts) if concepts else None
        pictures = []
        for start in range(0, count, self._batch):
            rows = np.arange(start, start + self._batch).clip(max=count - 1)
            chosen = [seeds[i] for i in rows]
            batch = self._generate(
                self._params,
                self._sampler,
                tuple(jnp.asarray(tokens[rows]) for tokens in ids),
                tuple(jnp.asarray(tokens[rows]) for tokens in negative_ids),
                concept_ids and tuple(jnp.asarray(tokens[rows]) for tokens in concept_ids),
                jnp.asarray(zeros[rows]),
                initial_latents(chosen, self.latent_shape) if latents is None else jnp.asarray(latents[rows]),
                picture_keys(chosen),
                None if users is None else jnp.asarray(users[rows], jnp.float32),
                jnp.asarray(scales[rows]),
                self._guidance,
            )
            pictures.append(np.asarray(batch)[: count - start])
            if on_batch is not None:
                on_batch(len(pictures[-1]))
        return np.concatenate(pictures)

    def truncated(self, prompts: list[str]) -> list[str]:
        """A warning for each prompt that the text encoders truncate. A generator warns of the same prompt once."""
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._told]
        self._told.update(fresh)
        lost = zip(fresh, self._model.truncated(fresh), strict=True) if fresh else ()
        length = self._model.text_encoder.config.max_position_embeddings
        return [truncation("prompt", prompt, length, part) for prompt, part in lost if part]

    def _concepts(self, concept: str | list[str] | None, count: int) -> list[str]:
        if concept is not None and not self._safe:
            raise PSAError("a concept is what sld leads away from; give sld, such as 'strong', or leave it out")
        given = CONCEPT if concept is None else concept
        concepts = given if isinstance(given, list) else [given] * (count if self._safe else 0)
        if self._safe and (len(concepts) != count or not all(each.strip() for each in concepts)):
            raise PSAError(f"concepts for {count} prompts: give one text that says something, or one for each")
        return concepts

    def _check(self, prompts, seeds, users, scale, latents) -> None:
        count = len(prompts)
        if (users is None) != (self.user_dim is None):
            raise PSAError("an adapter needs a user for every prompt, and users need an adapter: give both or neither")
        if users is not None and users.shape != (count, self.user_dim):
            raise PSAError(f"user embeddings have shape {users.shape}, the adapter needs ({count}, {self.user_dim})")
        if not prompts or len(seeds) != count:
            raise PSAError(f"{count} prompts and {len(seeds)} seeds: give at least one prompt and a seed for each")
        for seed in seeds:
            check_seed(seed, bits=PICTURE_BITS)
        if np.shape(scale) not in ((), (count,)):
            raise PSAError(f"scale has shape {np.shape(scale)}: give one number or one for each of {count} prompts")
        if latents is not None and latents.shape != (count, *self.latent_shape):
            raise PSAError(f"latents have shape {latents.shape}, expected {(count, *self.latent_shape)}")


def _generate(
    params: PyTree[Array],
    sampler: Sampler,
    ids: tuple[Int[Array, "b s"], ...],
    negative_ids: tuple[Int[Array, "b s"], ...],
    concept_ids: tuple[Int[Array, "b s"], ...] | None,
    zeros: Bool[Array, " b"],
    noise: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    users: Float[Array, "b d"] | None,
    scale: Float[Array, " b"],
    guidance: tuple[Float[Array, ""], Float[Array, ""]],
    *,
    graph: nnx.GraphDef,
    attend: Attend,
    size: tuple[int, int],
    guided: bool,
    unconditional: str,
    strength: Strength | None,
) -> Float[Array, "b height width 3"]:
    unet, vae, encoders, adapter = nnx.merge(graph, params)
    unet.compute = ComputeOptions(attend=attend)
    if guided:  # the unconditional part comes first, as in diffusers
        parts = [negative_ids, ids] if concept_ids is None else [negative_ids, ids, concept_ids]
        ids = jax.tree.map(lambda *each: jnp.concatenate(each), *parts)
    text = encode_text(encoders, ids)
    if guided:
        text = text.without(jnp.concatenate([zeros, *[jnp.zeros_like(zeros)] * (len(parts) - 1)]))
        if users is not None:
            users = jnp.concatenate([jnp.zeros_like(users) if unconditional == "zeros" else users, users])
        scale = jnp.concatenate([jnp.zeros_like(scale) if unconditional == "off" else scale, scale])
    batch, dtype = len(text.states), unet.conv_in.kernel.dtype
    contexts = unet.context(text.states) if adapter is None else adapter(unet, text.states, users, scale)
    contexts = jax.tree.map(lambda leaf: leaf.astype(dtype), contexts)  # an adapter is always in float32
    pooled = text.pooled if adapter is None else adapter.edit_pooled(text.pooled, text.states, users, scale)
    added = None if pooled is None else AddedConditions(pooled, size_ids(size, batch))

    def predict(latents, timestep, memory):
        # All parts are alike in front of the first cross-attention, but for SDXL's pooled text.
        rows = len(latents) if added is None else batch
        states = jnp.tile(latents, (rows // len(latents), 1, 1, 1)).astype(dtype)
        prefix = unet.run_prefix(states, jnp.full((rows,), timestep), added)
        prefix = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * (batch // rows)), prefix)
        output = unet.run_suffix(prefix, contexts).astype(jnp.float32)
        if strength is not None:
            return guide_safely(*jnp.split(output, 3), *guidance, strength, memory)
        return (guide(*jnp.split(output, 2), *guidance) if guided else output), None

    clean = sample(sampler, predict, noise, keys, None if strength is None else no_memory(noise))
    return vae.decode(clean / vae.config.scaling_factor)


def _as_float32(leaf: Array | jax.ShapeDtypeStruct) -> Array | jax.ShapeDtypeStruct:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    return leaf.astype(jnp.float32)


def _check_sld(name: str, adapter: Adapter | None, guidance: float) -> None:
    if name not in STRENGTHS:
        raise PSAError(f"sld {name!r} is unknown; use one of {', '.join(STRENGTHS)}")
    if adapter is not None:
        raise PSAError("sld is guidance of the base model, alike for every user; leave out the adapter, or sld")
    if guidance <= 1.0:
        raise PSAError(
            f"sld is part of guidance, and guidance {guidance} is none; give guidance above 1, or leave out sld"
        )
