"""The programs that commands run on an accelerator, lowered from shapes alone: weights and devices may be absent."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from psa_jax.data.model_shards import lower_encoders
from psa_jax.diffusion.generate import Generator
from psa_jax.errors import PSAError
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import MODELS, abstract_model
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.training.chips import of_first_host
from psa_jax.training.lowered import lower_step
from psa_jax.training.reference import make_reference_pass
from psa_jax.training.settings import user_dim
from psa_jax.training.setup import Setup
from psa_jax.training.sharding import check_batch, replicated


class Asked(NamedTuple):
    """What a program is lowered for.

    Attributes:
      batch_size: pairs, or for generate pictures, in a batch; None for the configuration's, or the command's default.
      resolution: side of the pictures in pixels; None for the model's.
      cached_text: text states come with the batch.
      sampler_steps: of generate.
    """

    batch_size: int | None = None
    resolution: int | None = None
    cached_text: bool = False
    sampler_steps: int = 20


class Work(NamedTuple):
    """A command's work on a batch.

    Attributes:
      lower: batch size -> each program with its name.
      calls: how often each program runs for a batch.
      chips: that share a batch.
      batch_size: items in a batch.
      least: the smallest batch; others are multiples of it.
      items: what a batch is of, `pairs` or `pictures`.
    """

    lower: Callable[[int], dict[str, Lowered]]
    calls: dict[str, int]
    chips: int
    batch_size: int
    least: int
    items: str


def work_of(what: str, config: ml_collections.ConfigDict, devices: Sequence[jax.Device], asked: Asked) -> Work:
    """The work of one of `WORKS`.

    Args:
      what: its name.
      config: of a training, checked before (`psa_jax.training.settings.validate`).
      devices: of a slice.
      asked: what it is lowered for.

    Raises:
      PSAError: a batch that the devices cannot share evenly, or a configuration without such work.
    """
    return WORKS[what](config, devices, asked)


def _train(config: ml_collections.ConfigDict, devices: Sequence[jax.Device], asked: Asked) -> Work:
    """A training step."""
    setup = _setup(config, devices, asked, asked.batch_size)
    side, least = asked.resolution or setup.model.square_side, setup.mesh.size * setup.accumulate
    return Work(
        lambda pairs: {"train": lower_step(setup, pairs, side)},
        {"train": 1},
        setup.mesh.size,
        asked.batch_size or config.batch_size,
        least,
        "pairs",
    )


def _reference(config: ml_collections.ConfigDict, devices: Sequence[jax.Device], asked: Asked) -> Work:
    """The pass over all draws of a batch before the first step."""
    if not config.reference.draws:
        raise PSAError(
            "reference.draws is 0, and a training without stored draws has no reference pass; give a number, such as "
            "--config.reference.draws=4"
        )
    pairs = asked.batch_size and asked.batch_size * config.accumulate
    setup = _setup(config, devices, asked, pairs)
    side, whole = asked.resolution or setup.model.square_side, replicated(setup.mesh)

    def lower(pairs: int) -> dict[str, Lowered]:
        check_batch(pairs, setup.mesh, 1)
        batch = setup.batch.abstract(pairs, side, setup.batch_sharding)
        number = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
        return {"reference": make_reference_pass(setup).lower(setup.frozen(), batch, number)}

    return Work(
        lower,
        {"reference": setup.fixed_draws.count},
        setup.mesh.size,
        asked.batch_size or config.batch_size // config.accumulate,
        setup.mesh.size,
        "pairs",
    )


def _generate(config: ml_collections.ConfigDict, devices: Sequence[jax.Device], asked: Asked) -> Work:
    """A batch of pictures with guidance, on one chip, as `psa-jax generate` draws them."""
    model = BaseModel.from_config(config).load(dtype=config.dtype, abstract=MODELS)
    adapter = AdapterConfig.for_unet(model.unet.config, user_dim=user_dim(config), **config.adapter)
    where = Mesh(np.asarray(devices[:1]), ("devices",))

    def lower(pictures: int) -> dict[str, Lowered]:
        generator = Generator(
            model,
            abstract_model(Adapter, adapter),
            steps=asked.sampler_steps,
            size=asked.resolution and (asked.resolution, asked.resolution),
            batch_size=pictures,
            devices=where,
        )
        return {"generate": generator.lower()}

    return Work(lower, {"generate": 1}, 1, asked.batch_size or 8, 1, "pictures")


def _build(config: ml_collections.ConfigDict, devices: Sequence[jax.Device], asked: Asked) -> Work:
    """The encodings of a batch of pairs on the chips of one host: two pictures and a prompt each, in float32."""
    model = BaseModel.from_config(config).load(abstract=MODELS)
    host, side = of_first_host(devices), asked.resolution or model.square_side
    return Work(
        lambda batch: lower_encoders(model, side, batch, host),
        {"vae": 2, "text_encoder": 1},
        len(host),
        asked.batch_size or 16,
        len(host),
        "pairs",
    )


def _setup(config: ml_collections.ConfigDict, devices: Sequence[jax.Device], asked: Asked, pairs: int | None) -> Setup:
    if pairs is not None:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.batch_size = pairs
    return Setup.from_config(
        config, user_dim=user_dim(config), cached_text=asked.cached_text, devices=devices, abstract=MODELS
    )


WORKS: dict[str, Callable[[ml_collections.ConfigDict, Sequence[jax.Device], Asked], Work]] = {
    "train": _train,
    "generate": _generate,
    "build": _build,
    "reference": _reference,
}
"""Name -> the work that `psa-jax aot` compiles."""
