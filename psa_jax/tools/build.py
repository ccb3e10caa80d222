"""`psa-jax build`: a SAGE folder to shards for a base model. The last line on stdout is JSON."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int32

from psa_jax.data.builder import Tokenizer, build_shards
from psa_jax.data.encoding import TextCache
from psa_jax.data.latents import Preprocess, fingerprint, on_devices
from psa_jax.data.shards import read_info
from psa_jax.diffusion.conditioning import encode_text
from psa_jax.diffusion.generate import truncation
from psa_jax.errors import PSAError
from psa_jax.interop.base_model import EMBEDDED, BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.progress import say, stage


def run(args: Namespace) -> int:
    """Makes the shards, or encodes one host's part of them."""
    if (args.host is None) != (args.hosts is None):
        raise PSAError("--host=I and --hosts=N belong together; give both or neither")
    if args.host is not None and args.host >= args.hosts:
        raise PSAError(f"--host={args.host} of --hosts={args.hosts}: count from 0")
    stage(f"reading {args.model}, then every row and picture of {args.sage_dir}, before the first is encoded")
    model = BaseModel.from_config(vars(args)).load()
    folder = build(
        model,
        args.sage_dir,
        args.out,
        resolution=args.resolution or model.square_side,
        family="tiny" if args.model == EMBEDDED else model.family,
        flips=args.flips,
        text=args.text_embeddings,
        batch_size=args.batch_size,
        threads=args.threads,
        part=None if args.host is None else (args.host, args.hosts),
    )
    if args.host is not None:
        print(json.dumps({"parts": str(folder), "host": args.host, "hosts": args.hosts}))
        return 0
    info = read_info(folder)
    about = {name: info[name] for name in ("fingerprint", "splits", "pictures", "flips")}
    print(json.dumps({"out": str(folder), "config": f"{info['family']}_{info['resolution']}", **about}))
    return 0


def build(
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
    """`build_shards` with the VAE, the tokenizers and, for `text`, the text encoders of a model."""
    factor = model.vae.config.downscale
    if resolution % factor:
        raise PSAError(f"resolution {resolution} is no multiple of {factor}, by which the VAE shrinks pictures")
    preprocess, side = Preprocess(resolution), resolution // factor
    tokenizers = [_telling(model), *([] if model.text_encoder_2 is None else [model.tokenize_2])]
    return build_shards(
        sage_dir,
        out,
        encode=on_devices(lambda vae, images: vae.encode(images), model.vae, batch_size, devices),
        vae_fingerprint=fingerprint(model.vae_tensors, preprocess),
        latent_shape=(side, side, 2 * model.vae.config.latent_channels),
        tokenizer=tokenizers,
        resolution=resolution,
        family=family,
        splits=splits,
        preprocess=preprocess,
        flips=flips,
        text=_text_cache(model, batch_size, devices) if text else None,
        batch_size=batch_size,
        threads=threads,
        part=part,
    )


def _telling(model: StableDiffusion) -> Tokenizer:
    """The first tokenizer, which says how many captions are too long for the text encoders."""

    def tokenize(captions: list[str]) -> Int32[np.ndarray, "n t"]:
        distinct = list(dict.fromkeys(captions))
        lost = [(caption, part) for caption, part in zip(distinct, model.truncated(distinct), strict=True) if part]
        if lost:
            length = model.text_encoder.config.max_position_embeddings
            first = truncation("caption", lost[0][0], length, lost[0][1])
            say(f"{len(lost)} of {len(distinct)} captions are too long; {first}")
        return model.tokenize(captions)

    return tokenize


def _text_cache(model: StableDiffusion, batch_size: int, devices: list[jax.Device] | None) -> TextCache:
    encoders = model.text_encoders

    def encode(encoders, ids: Int32[jax.Array, "b k t"]) -> dict[str, jax.Array]:
        found = encode_text(tuple(encoders), tuple(ids[:, number] for number in range(len(encoders))))
        return {name: value for name, value in found._asdict().items() if value is not None}

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(nnx.state(encoders)):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return TextCache(on_devices(encode, encoders, batch_size, devices), digest.hexdigest())
