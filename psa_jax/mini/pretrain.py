"""Trains the embedded tiny Stable Diffusion on SAGE-mini: VAE, then text encoder and UNet together.

Pictures, safe and unsafe, with their captions; no profiles. The result is an ordinary diffusers folder.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

from psa_jax.diffusion.pixels import from_bytes
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.mini.captions import caption, sample_scenes
from psa_jax.mini.world import labels_of
from psa_jax.models.clip import CLIPText
from psa_jax.models.unet import UNet
from psa_jax.models.vae import VAE, latent_noise, sample_latents
from psa_jax.progress import Progress
from psa_jax.seeds import check_seed
from psa_jax.training.checkpoints import as_it_is

KEEP_EVERY = 500
"""Steps between two checkpoints of a long phase."""


class MiniSet:
    """SAGE-mini pictures in memory, with prompts, captions and labels [n, 4] (`psa_jax.mini.world.Labels`).

    Args:
      count: number of pictures.
      seed, split: as in `sample_scenes`.
    """

    def __init__(self, count: int, seed: int, split: str = "train"):
        rows = list(sample_scenes(count, seed, split))
        self.images: UInt8[np.ndarray, "n 64 64 3"] = np.stack([image for image, _ in rows])
        self.prompts = [prompt for _, prompt in rows]
        self.captions = [caption(prompt) for prompt in self.prompts]
        self.labels: Int[np.ndarray, "n 4"] = np.asarray([labels_of(prompt.scene) for prompt in self.prompts], np.int32)


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay to 1 % of the peak, and gradient clipping at norm 1.

    Args:
      config: learning_rate (the peak), steps, weight_decay.
    """
    peak, warm_up = config.learning_rate, min(100, config.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, config.steps, 0.01 * peak)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=config.weight_decay))


def train_loop(
    loss: Callable,
    params: PyTree[Array],
    config: ml_collections.ConfigDict,
    data: dict[str, Array],
    *,
    name: str,
    log: Callable[[dict], None],
    ema: float | None = None,
    keep: Path | None = None,
) -> PyTree[Array]:
    """Minimises `loss(params, data, key)` for `config.steps` steps.

    Args:
      loss: a scalar function.
      params: initial parameters.
      config: steps, seed, and what `optimizer` needs.
      data: arrays for `loss`; the loss samples its own batch from them.
      name: of the phase, for the log and the progress bar.
      log: called with a dict about every 50 steps: phase, step, mean loss, seconds.
      ema: decay of an exponential moving average that is returned instead of the last parameters.
      keep: folder of checkpoints, one every KEEP_EVERY steps; training resumes from the last one with the same result.

    Returns:
      The parameters, or their average.
    """
    transform = optimizer(config)
    average = params if ema is not None else None

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, average, state, data, key):
        value, gradient = jax.value_and_grad(loss)(params, data, key)
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        if average is not None:
            average = jax.tree.map(lambda a, p: a + (1.0 - ema) * (p - a), average, params)
        return params, average, state, value

    # Buffers given to a donating function must not be shared.
    params, average = jax.tree.map(jnp.copy, (params, average))
    state, key, values, start = transform.init(params), jax.random.key(check_seed(config.seed)), [], time.perf_counter()
    manager = None
    first = 0
    if keep is not None:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=KEEP_EVERY)
        manager = ocp.CheckpointManager(as_it_is(keep), options=options)
        first = manager.latest_step() or 0
        if first:
            kept = manager.restore(first, args=ocp.args.StandardRestore((params, average, state)))
            params, average, state = kept
    with Progress(config.steps, "step", name, first=first) as progress:
        for number in range(first, config.steps):
            if manager is not None and number > first:
                manager.save(number, args=ocp.args.StandardSave((params, average, state)))
            params, average, state, value = step(params, average, state, data, jax.random.fold_in(key, number))
            values.append(value)
            if number == first:
                jax.block_until_ready(value)  # keeps compilation out of the measured speed
            if len(values) == 50 or number + 1 == config.steps:
                mean = float(np.mean(jax.device_get(values)))
                log({"phase": name, "step": number + 1, "loss": mean, "seconds": round(time.perf_counter() - start, 1)})
                values = []
            progress.step()
    if manager is not None:
        manager.close()
    return params if average is None else average


def json_log(path: Path) -> Callable[[dict], None]:
    """Makes a function that appends a JSON object to a file, as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(row: dict) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    return write


# --- autoencoder


def train_vae(vae: VAE, images: UInt8[np.ndarray, "n h w 3"], config: ml_collections.ConfigDict, log: Callable) -> VAE:
    """Trains a VAE on absolute error + squared error + a small KL term, first on random crops, then on whole pictures.

    Args:
      vae: initial weights.
      images: the pictures, as bytes.
      config: kl_weight, and for each of the phases `crops` and `whole`: batch_size, size, and what `train_loop` needs.
      log: as in `train_loop`.

    Returns:
      The trained VAE.
    """
    graph, params = nnx.split(vae, nnx.Param)

    def crops(key: PRNGKeyArray, pool: UInt8[Array, "n h w 3"], count: int, size: int) -> Float[Array, "b s s 3"]:
        which, row, column = jax.random.split(key, 3)
        # On the grid of latents, on which the cells of the pictures lie, too.
        span = (pool.shape[1] - size) // vae.config.downscale + 1
        index = jax.random.randint(which, (count,), 0, pool.shape[0])
        top, left = jax.random.randint(row, (count,), 0, span), jax.random.randint(column, (count,), 0, span)
        top, left = top * vae.config.downscale, left * vae.config.downscale
        cut = jax.vmap(lambda i, y, x: jax.lax.dynamic_slice(pool, (i, y, x, 0), (1, size, size, 3))[0])
        return from_bytes(cut(index, top, left))

    def loss(params, data, key, count: int, size: int):
        model = nnx.merge(graph, params)
        image = crops(jax.random.fold_in(key, 0), data["images"], count, size)
        moments = model.encode(image)
        latents = sample_latents(moments, latent_noise(jax.random.fold_in(key, 1), moments), 1.0)
        error = model.decode(latents) - image
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        kl = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)
        return jnp.mean(jnp.abs(error)) + jnp.mean(error**2) + config.kl_weight * kl

    data = {"images": jnp.asarray(images)}
    for name in ("crops", "whole"):
        part = config[name]
        params = train_loop(
            functools.partial(loss, count=part.batch_size, size=part.size),
            params,
            part,
            data,
            name=f"vae_{name}",
            log=log,
        )
    return nnx.merge(graph, params)


def encode_all(
    vae: VAE, images: UInt8[np.ndarray, "n h w 3"], batch: int = 64
) -> Iterator[Float[np.ndarray, "b h w m"]]:
    """Yields the VAE's moments of many pictures, batch by batch.

    Args:
      vae: with a jitted encoder.
      images: bytes.
      batch: pictures in a batch; the last one may be smaller.
    """
    graph, params = nnx.split(vae, nnx.Param)
    encode = jax.jit(lambda params, x: nnx.merge(graph, params).encode(from_bytes(x)))
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        padded = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
        yield np.asarray(encode(params, padded))[: len(part)]


# --- text encoder and UNet

PHASES = ("denoiser", "restart")


def train_denoiser(
    unet: UNet,
    text_encoder: CLIPText,
    moments: Float[np.ndarray, "n h w m"],
    input_ids: Int[np.ndarray, "n s"],
    empty_ids: Int[np.ndarray, " s"],
    scaling_factor: float,
    schedule: NoiseSchedule,
    config: ml_collections.ConfigDict,
    log: Callable,
    phases: Sequence[str] = PHASES,
    keep: Path | None = None,
) -> tuple[UNet, CLIPText]:
    """Trains text encoder and UNet together on noise prediction, with min-SNR weights and dropped prompts.

    The second phase is a warm restart: the learning rate rises and falls once more.

    Args:
      unet, text_encoder: initial weights.
      moments: of the pictures.
      input_ids: of their captions.
      empty_ids: of the empty prompt, which replaces dropped ones.
      scaling_factor: of the latents.
      schedule: noise schedule.
      config: min_snr (γ), text_dropout, and for each of PHASES: batch_size, ema, and what `train_loop` needs.
      log: as in `train_loop`.
      phases: those of PHASES to run.
      keep: folder for checkpoints, one folder for each phase; None keeps none.

    Returns:
      The exponential moving averages of UNet and text encoder.

    Source: min-SNR weights, arXiv 2303.09556; warm restarts, arXiv 1608.03983.
    """
    graph, params = nnx.split((unet, text_encoder), nnx.Param)
    weights = jnp.minimum(schedule.signal_to_noise(), config.min_snr) / schedule.signal_to_noise()

    def loss(params, data, key, batch_size: int):
        unet, text_encoder = nnx.merge(graph, params)
        which, sample, noise_key, time_key, drop = jax.random.split(key, 5)
        index = jax.random.randint(which, (batch_size,), 0, data["moments"].shape[0])
        chosen = data["moments"][index].astype(jnp.float32)
        latents = sample_latents(chosen, latent_noise(sample, chosen), scaling_factor)
        noise = jax.random.normal(noise_key, latents.shape)
        timesteps = jax.random.randint(time_key, (batch_size,), 0, schedule.steps)
        dropped = jax.random.bernoulli(drop, config.text_dropout, (batch_size, 1))
        ids = jnp.where(dropped, data["empty_ids"][None, :], data["input_ids"][index])
        context = unet.context(text_encoder(ids).last)
        predicted = unet(schedule.add_noise(latents, noise, timesteps), timesteps.astype(jnp.float32), context)
        errors = jnp.mean((predicted - noise) ** 2, axis=(1, 2, 3))
        return jnp.mean(weights[timesteps] * errors)

    data = {
        "moments": jnp.asarray(moments, jnp.float16),
        "input_ids": jnp.asarray(input_ids),
        "empty_ids": jnp.asarray(empty_ids),
    }
    for name in phases:
        folder = None if keep is None else keep / name
        params = train_loop(
            functools.partial(loss, batch_size=config[name].batch_size),
            params,
            config[name],
            data,
            name=name,
            log=log,
            ema=config[name].ema,
            keep=folder,
        )
    return nnx.merge(graph, params)
