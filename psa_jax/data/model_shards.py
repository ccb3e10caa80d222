"""Shards for a loaded base model: its VAE, tokenizers and text encoders, put into `build_shards`."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.stages import Lowered
from jaxtyping import Float32, Int32

from psa_jax.data.batched import lower_on_devices, on_devices
from psa_jax.data.build import Tokenizer, build_shards
from psa_jax.data.encoding import TextCache
from psa_jax.data.fingerprints import text_fingerprint, vae_fingerprint
from psa_jax.data.preprocess import Preprocess
from psa_jax.diffusion.conditioning import encode_text
from psa_jax.diffusion.generate import truncation
from psa_jax.errors import PSAError
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.clip import CLIPText
from psa_jax.models.vae import VAE
from psa_jax.progress import print_on_main


def build_for_model(
    model: StableDiffusion,
    sage_dir: Path,
    out: Path,
    *,
    resolution: int,
    family: str,
    flips: bool = False,
    text: bool = False,
    splits: Sequence[str] | None = None,
    batch_size: int = 16,
    threads: int | None = None,
    part: tuple[int, int] | None = None,
    devices: list[jax.Device] | None = None,
) -> Path:
    """`build_shards` with the VAE and the tokenizers of a model and, for `text`, its text encoders.

    Args:
      model: the base model that training will use.
      sage_dir, out, family, flips, splits, batch_size, threads, part: as in `build_shards`.
      resolution: side of the pictures, in pixels: a multiple of the VAE's downscale factor.
      text: store text embeddings.
      devices: to split batches over; None takes those of this process.

    Returns:
      `out`, or with `part` the folder of the work files.

    Raises:
      PSAError: a resolution or batch size that does not fit, or as in `build_shards`.
    """
    _check_resolution(model, resolution)
    factor = model.vae.config.downscale
    preprocess, side = Preprocess(resolution), resolution // factor
    tokenizers = [_reporting_truncation(model), *([] if model.text_encoder_2 is None else [model.tokenize_2])]
    return build_shards(
        sage_dir,
        out,
        encode=on_devices(_encode_pictures, model.vae, batch_size, devices),
        vae_fingerprint=vae_fingerprint(model.vae_tensors, preprocess),
        latent_shape=(side, side, 2 * model.vae.config.latent_channels),
        tokenizer=tokenizers,
        family=family,
        splits=splits,
        preprocess=preprocess,
        flips=flips,
        text=text_cache(model, batch_size, devices) if text else None,
        batch_size=batch_size,
        threads=threads,
        part=part,
    )


def text_cache(model: StableDiffusion, batch_size: int, devices: list[jax.Device] | None = None) -> TextCache:
    """The text encoders of a model, as what `build_shards` encodes prompts with.

    Args:
      batch_size: prompts in each call, divisible by the number of devices.
      devices: to split batches over; None takes those of this process.
    """
    encoders = model.text_encoders
    return TextCache(on_devices(_encode_prompts, encoders, batch_size, devices), text_fingerprint(encoders))


def lower_encoders(
    model: StableDiffusion, resolution: int, batch_size: int, devices: list[jax.Device]
) -> dict[str, Lowered]:
    """The two programs of a build, lowered from shapes alone: `vae` for pictures, `text_encoder` for prompts.

    Args:
      model: its weights may be shapes.
      resolution: side of the pictures, in pixels.
      batch_size: pictures or prompts in a call.
      devices: to split a batch over.

    Raises:
      PSAError: a resolution or batch size that does not fit.
    """
    _check_resolution(model, resolution)
    pictures = jax.ShapeDtypeStruct((batch_size, resolution, resolution, 3), np.float32)
    length = model.text_encoder.config.max_position_embeddings
    prompts = jax.ShapeDtypeStruct((batch_size, len(model.text_encoders), length), np.int32)
    return {
        "vae": lower_on_devices(_encode_pictures, model.vae, pictures, devices),
        "text_encoder": lower_on_devices(_encode_prompts, model.text_encoders, prompts, devices),
    }


def _check_resolution(model: StableDiffusion, resolution: int) -> None:
    factor = model.vae.config.downscale
    if resolution % factor:
        raise PSAError(f"resolution {resolution} is no multiple of {factor}, by which the VAE shrinks pictures")


def _encode_pictures(vae: VAE, pictures: Float32[jax.Array, "b h w c"]) -> Float32[jax.Array, "b h2 w2 m"]:
    return vae.encode(pictures)


def _encode_prompts(encoders: tuple[CLIPText, ...], ids: Int32[jax.Array, "b k t"]) -> dict[str, jax.Array]:
    found = encode_text(tuple(encoders), tuple(ids[:, number] for number in range(len(encoders))))
    return {name: value for name, value in found._asdict().items() if value is not None}


def _reporting_truncation(model: StableDiffusion) -> Tokenizer:
    """The first tokenizer; it reports how many captions are too long for the text encoders."""

    def tokenize(captions: list[str]) -> Int32[np.ndarray, "n t"]:
        distinct = list(dict.fromkeys(captions))
        lost = [(caption, part) for caption, part in zip(distinct, model.truncated(distinct), strict=True) if part]
        if lost:
            length = model.text_encoder.config.max_position_embeddings
            first = truncation("caption", lost[0][0], length, lost[0][1])
            print_on_main(f"{len(lost)} of {len(distinct)} captions are too long; {first}")
        return model.tokenize(captions)

    return tokenize
