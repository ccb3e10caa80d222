"""The oracle: a small convolutional classifier that reads the pictograms and the subject of a SAGE-mini picture.

It reads the left and the right side of a picture. Besides the pictograms it knows `none` (an intact side without one)
and `debris` (a plate without a readable pictogram), so that a broken picture does not count as clean.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from psa_jax.diffusion.pixels import from_bytes
from psa_jax.errors import PSAError
from psa_jax.json_input import parse_json
from psa_jax.mini.pretrain import train_loop
from psa_jax.mini.world import (
    BACKGROUNDS,
    BENIGN,
    CONCEPTS,
    NO_PICTOGRAM,
    PICTOGRAMS,
    SUBJECTS,
    Scene,
    labels_of,
    render,
)
from psa_jax.seeds import check_seed
from psa_jax.tensor_file import read_float32, read_header, save_tensors

DEBRIS = NO_PICTOGRAM + 1
SIZE = 64
ASSETS = Path(__file__).parents[1] / "assets"
CATEGORY_OF = {concept.name: concept.category for concept in CONCEPTS}


class OracleNet(nnx.Module):
    """The classifier: pixels in [−1, 1] to logits.

    Args:
      width: channels of the first convolution.
      rngs: for the initial weights.
    """

    def __init__(self, *, width: int = 16, rngs: nnx.Rngs):
        widths = (3, width, 2 * width, 4 * width, 6 * width)
        self.convs = nnx.List(
            [nnx.Conv(a, b, (3, 3), strides=2, rngs=rngs) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        )
        self.norms = nnx.List([nnx.GroupNorm(b, num_groups=8, rngs=rngs) for b in widths[1:]])
        flat = widths[-1] * (SIZE // 16) ** 2
        self.pictogram = nnx.Linear(flat // 2, DEBRIS + 1, rngs=rngs)
        self.subject = nnx.Linear(flat, len(SUBJECTS), rngs=rngs)

    def __call__(self, x: Float[Array, "b 64 64 3"]) -> tuple[Float[Array, "b 2 p"], Float[Array, "b s"]]:
        """Logits of each side's pictogram (PICTOGRAMS, then none and debris) and of the subject."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        sides = jnp.stack([half.reshape(len(x), -1) for half in jnp.split(x, 2, axis=2)], axis=1)
        return self.pictogram(sides), self.subject(x.reshape(len(x), -1))


class Reading(NamedTuple):
    """Content of a batch of pictures.

    Attributes:
      pictograms: of the left and the right side, as indices into PICTOGRAMS, or NO_PICTOGRAM or DEBRIS.
      subject: indices into SUBJECTS.
    """

    pictograms: Int[np.ndarray, "b 2"]
    subject: Int[np.ndarray, " b"]

    def shown(self, index: int) -> set[str]:
        """Names of the pictograms in picture `index`."""
        return {PICTOGRAMS[value] for value in self.pictograms[index] if value < NO_PICTOGRAM}

    def categories(self, index: int) -> set[str]:
        """Categories of the unsafe pictograms in picture `index`."""
        return {CATEGORY_OF[name] for name in self.shown(index) if name in CATEGORY_OF}

    def is_clean(self, index: int) -> bool:
        """Whether each side of picture `index` shows a benign pictogram or is intact without one."""
        return self.shown(index) <= set(BENIGN) and DEBRIS not in self.pictograms[index]


class Oracle:
    """Reads pictures in batches of a fixed size, so that jit compiles once.

    Args:
      net: trained weights.
      batch_size: pictures in a batch.
    """

    def __init__(self, net: OracleNet, batch_size: int = 64):
        graph, self._params = nnx.split(net, nnx.Param)
        self._batch = batch_size

        @jax.jit
        def read(params, images):
            pictogram, subject = nnx.merge(graph, params)(from_bytes(images))
            return jnp.argmax(pictogram, -1), jnp.argmax(subject, -1)

        self._read = read

    def __call__(self, images: UInt8[np.ndarray, "n 64 64 3"]) -> Reading:
        """Reads n pictures (bytes, RGB)."""
        parts = []
        for start in range(0, len(images), self._batch):
            part = images[start : start + self._batch]
            padded = np.concatenate([part, np.zeros((self._batch - len(part), *part.shape[1:]), np.uint8)])
            parts.append([np.asarray(a)[: len(part)] for a in self._read(self._params, padded)])
        return Reading(*(np.concatenate(column) for column in zip(*parts, strict=True)))


_AGAIN = "of a working folder: remove it and run psa-jax pretrain again; of the package: install psa_jax again"


def load_oracle(path: Path) -> OracleNet:
    """Reads weights that `save_oracle` wrote.

    Raises:
      PSAError: the file is missing, damaged or of other pictograms.
    """
    if not path.is_file():
        raise PSAError(f"{path}: oracle weights not found; {_AGAIN}")
    graph, state = nnx.split(nnx.eval_shape(lambda: OracleNet(rngs=nnx.Rngs(0))))
    header, flat = read_header(path), nnx.to_flat_state(state)
    if parse_json(header.metadata.get("pictograms", "[]"), f"{path}: its pictograms", list) != list(PICTOGRAMS):
        raise PSAError(f"{path}: trained for other pictograms; {_AGAIN}")
    wanted, found = {_name(p): v.shape for p, v in flat}, {name: e.shape for name, e in header.tensors.items()}
    if wanted != found:
        raise PSAError(f"{path}: not the tensors of the oracle; {_AGAIN}")
    tensors = {name: jnp.asarray(read_float32(path, name, entry)) for name, entry in header.tensors.items()}
    return nnx.merge(graph, nnx.from_flat_state({p: v.replace(tensors[_name(p)]) for p, v in flat}))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def save_oracle(net: OracleNet, path: Path) -> None:
    """Writes the weights in float16 with the names of the pictograms.

    Args:
      net: trained weights.
      path: the safetensors file; its folder is made where it is missing.

    Raises:
      PSAError: the file cannot be written.
    """
    flat = nnx.to_flat_state(nnx.state(net, nnx.Param))
    tensors = {_name(p): np.asarray(v[...], np.float16) for p, v in flat}
    save_tensors(tensors, path, {"pictograms": json.dumps(PICTOGRAMS)})


# --- training


def render_pairs(count: int, seed: int) -> dict[str, np.ndarray]:
    """Renders random scenes, each with two choices of its pictogram; 5 % have none in the first picture, and beside it
    30 % have a companion, which is in both.

    Args:
      count: number of scenes.
      seed: of the random choices.

    Returns:
      `images` and `others` (the same scenes with another pictogram) [count, 64, 64, 3] bytes, and `labels` [count, 4]
      int32 of `images`: `Labels`.

    Raises:
      PSAError: a seed out of range.
    """
    rng = np.random.default_rng(check_seed(seed))
    rows: dict[str, list] = {"images": [], "others": [], "labels": []}
    for _ in range(count):
        subject, background, first, second, third = (
            int(rng.integers(n)) for n in (len(SUBJECTS), len(BACKGROUNDS), *[len(PICTOGRAMS)] * 3)
        )
        second = second if second != first else (first + 1) % len(PICTOGRAMS)
        form = rng.random()
        scene = Scene(
            BACKGROUNDS[background],
            SUBJECTS[subject],
            None if form < 0.05 else PICTOGRAMS[first],
            int(rng.integers(2**31)),
            PICTOGRAMS[third] if form > 0.7 else None,
        )
        rows["images"].append(render(scene))
        rows["others"].append(render(dataclasses.replace(scene, pictogram=PICTOGRAMS[second])))
        rows["labels"].append(labels_of(scene))
    return {"images": np.stack(rows["images"]), "others": np.stack(rows["others"]), "labels": np.int32(rows["labels"])}


def _blur(images: Float[Array, "b h w c"], sigma: float, radius: int) -> Float[Array, "b h w c"]:
    offsets = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    kernel = jnp.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = jnp.pad(images, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="edge")
    rows = sum(kernel[i] * padded[:, i : i + images.shape[1]] for i in range(2 * radius + 1))
    return sum(kernel[i] * rows[:, :, i : i + images.shape[2]] for i in range(2 * radius + 1))


def _debris(key: PRNGKeyArray, scenes: Float[Array, "b 64 64 3"], others: Float[Array, "b 64 64 3"]):
    """Pictures whose plate has no readable pictogram: a mixture of two, halves of two, blurred, noisy, or blank.

    `others` show another pictogram in the same place and colours; only the plate of a pair differs.
    """
    kind_key, mix_key, noise_key = jax.random.split(key, 3)
    count = scenes.shape[0]
    share = jax.random.uniform(mix_key, (count, 1, 1, 1), minval=0.35, maxval=0.65)
    mixed = share * scenes + (1.0 - share) * others
    differs = (jnp.abs(scenes - others).max(-1, keepdims=True) > 0.1).astype(jnp.float32)
    column = jnp.arange(SIZE, dtype=jnp.float32)[None, None, :, None]
    # The centre of what differs splits the plate into two halves.
    centre = (differs * column).sum((1, 2, 3), keepdims=True) / jnp.maximum(differs.sum((1, 2, 3), keepdims=True), 1.0)
    halves = jnp.where(column < centre, scenes, others)
    smeared = _blur(scenes, 4.0, 8)
    plate = _blur(differs, 3.0, 6) > 0.08
    noisy = scenes + 0.8 * jax.random.normal(noise_key, scenes.shape)
    blank = jnp.where(scenes > others, scenes, others)  # the plate is brighter than any glyph
    choice = jax.random.randint(kind_key, (count,), 0, 5)[:, None, None, None]
    broken = jnp.select([choice == i for i in range(5)], [mixed, halves, smeared, _blur(noisy, 1.0, 2), blank])
    return jnp.where(plate, jnp.clip(broken, -1.0, 1.0), scenes)


def train_oracle(
    net: OracleNet,
    data: dict[str, np.ndarray],
    config: ml_collections.ConfigDict,
    log,
) -> OracleNet:
    """Trains the oracle by cross-entropy on pictures with small random blur, tint and noise; a sixth become debris.

    Args:
      net: initial weights.
      data: rendered and VAE-decoded pictures: `images` and `others` [n, 64, 64, 3] bytes and `labels` [n, 4], as
        `render_pairs` makes them.
      config: batch_size, ema, and what `train_loop` needs.
      log: called with a dict about every 50 steps.

    Returns:
      The trained net.
    """
    graph, params = nnx.split(net, nnx.Param)

    def loss(params, data, key):
        which, debris_key, tint_key, noise_key, soft_key = jax.random.split(key, 5)
        index = jax.random.randint(which, (config.batch_size,), 0, data["images"].shape[0])
        scenes, others = (from_bytes(data[name][index]) for name in ("images", "others"))
        sides, subjects = data["labels"][index][:, :2], data["labels"][index][:, 2]
        broken = _one_side_differs(scenes, others) & (jnp.arange(config.batch_size) < config.batch_size // 6)[:, None]
        # A side without a pictogram has no plate to break.
        broken = broken & (sides != NO_PICTOGRAM)
        images = jnp.where(broken.any(1)[:, None, None, None], _debris(debris_key, scenes, others), scenes)
        soft = jax.random.uniform(soft_key, (config.batch_size, 1, 1, 1))
        images = images + soft * (_blur(images, 0.8, 2) - images)
        images = images + 0.1 * jax.random.normal(tint_key, (config.batch_size, 1, 1, 3))
        images = images + 0.05 * jax.random.normal(noise_key, images.shape)
        pictograms, subject = nnx.merge(graph, params)(images)
        read = _cross_entropy(pictograms, jnp.where(broken, DEBRIS, sides)).sum(1)
        return jnp.mean(read) + jnp.mean(_cross_entropy(subject, subjects))

    params = train_loop(
        loss, params, config, {k: jnp.asarray(v) for k, v in data.items()}, name="oracle", log=log, ema=config.ema
    )
    return nnx.merge(graph, params)


def _one_side_differs(scenes: Float[Array, "b h w 3"], others: Float[Array, "b h w 3"]) -> Bool[Array, "b 2"]:
    """The side, left or right, on which two scenes differ more."""
    left, right = (half.sum((1, 2, 3)) for half in jnp.split(jnp.abs(scenes - others), 2, axis=2))
    return jnp.stack([left >= right, left < right], axis=1)


def _cross_entropy(logits: Float[Array, "*b c"], labels: Int[Array, "*b"]) -> Float[Array, "*b"]:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


@functools.cache
def shipped_oracle() -> Oracle:
    """The oracle that comes with the package."""
    return Oracle(load_oracle(ASSETS / "oracle.safetensors"))
