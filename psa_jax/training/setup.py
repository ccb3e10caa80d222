"""The training set-up: everything that a configuration decides about a training step, put together once."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError
from psa_jax.interop.adapter_file import GATE_NAMES
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.models.attention import REMAT, ComputeOptions
from psa_jax.models.fused_attention import TILES, fused_attention
from psa_jax.preference.batch import Batch, BatchSpec
from psa_jax.preference.draws import FixedDraws, fixed_draws_or_none
from psa_jax.preference.metrics import TIME_PARTS
from psa_jax.preference.objective import Objective
from psa_jax.preference.pair_loss import FrozenModel
from psa_jax.training.optimizer import Arrays, make_optimizer
from psa_jax.training.settings import check_accumulate, validate_devices
from psa_jax.training.sharding import (
    FSDP,
    REPLICATED,
    SPLIT,
    by_rows,
    constrained,
    replicated,
    shardings,
    weight_sharding,
    whole_but_blocks,
)
from psa_jax.training.state import Frozen, TrainState, init_state

# By default XLA keeps fused intermediates in float32. Policy and reference are fused differently (the policy needs
# intermediates for its gradient), so their rounding errors would not cancel.
NO_EXCESS_PRECISION = {"xla_allow_excess_precision": False}

# For few pictures a TPU's compiler cuts each into strips, as if they were more, around each convolution. By its own
# estimate that takes as long as the convolution (tests/benchmarks/NOTES.md). None of the options does it alone. They
# are names of the libtpu that goes with this jax; one that does not know them would refuse to compile.
SPACE_TO_BATCH_JAX = (0, 10)
NO_SPACE_TO_BATCH = {
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
    "xla_tpu_run_space_to_batch_after_spmd": False,
}

# A backward kernel's tile takes up to 17.4 MiB of the memory inside a chip, where 16 are allowed; whether it fits
# depends on what is around it. By the estimate 20 MiB cost nothing (tests/benchmarks/NOTES.md).
ROOM_FOR_KERNELS = {"xla_tpu_scoped_vmem_limit_kib": 20_480}

# A CPU's compiler orders a program for threads that run side by side. For SD1.5's step that takes a quarter more memory
# for temporaries, and no less time. A small model's step is a tenth faster so, and takes no more memory.
LARGE = 100_000_000  # parameters of a UNet
LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Models that a step does not run where text is cached."""


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """Everything that a training step is made from.

    Attributes:
      model: the base model; its weights may be abstract (shapes), to compile a step that is not run.
      mesh: the devices, with axes `data` and `fsdp`.
      adapter: sizes of the adapter.
      objective: the loss.
      optimizer: of the adapter's arrays.
      schedule: the base model's noise schedule.
      fixed_draws: draws whose reference errors are stored; the step then runs no reference.
      cached_text: whether text states come with the batch; the step then runs no text encoder.
      accumulate: parts of a batch that are worked on one after the other; the result is that of the whole batch.
      remat: what is stored for the backward pass, a key of `psa_jax.models.attention.REMAT`.
      ema: decay of the moving average of the adapter; 0 for none.
      frozen_sharding: where the frozen weights live, a key of `psa_jax.training.sharding.RULES`.

    Raises:
      PSAError: an option that does not exist, or that does not go with the loss.
    """

    model: StableDiffusion
    mesh: Mesh
    adapter: AdapterConfig
    objective: Objective
    optimizer: optax.GradientTransformation
    fixed_draws: FixedDraws | None = None
    cached_text: bool = False
    accumulate: int = 1
    remat: str = "none"
    ema: float = 0.0
    frozen_sharding: str = REPLICATED
    schedule: NoiseSchedule = dataclasses.field(init=False)

    def __post_init__(self):
        # Made here and not where it is used: inside jit it would be made of tracers.
        object.__setattr__(self, "schedule", NoiseSchedule.from_config(self.model.scheduler_config))
        if self.remat not in REMAT:
            raise PSAError(f"remat = {self.remat!r} is unknown; use one of {', '.join(REMAT)}")
        if not 0.0 <= self.ema < 1.0:
            raise PSAError(f"optimizer.ema = {self.ema}; give a decay from 0 (none) to below 1")
        check_accumulate(self.objective, self.accumulate)

    @classmethod
    def from_config(
        cls,
        config: ml_collections.ConfigDict,
        *,
        user_dim: int,
        flips: bool = False,
        cached_text: bool = False,
        devices: Sequence[jax.Device] | None = None,
        abstract: Collection[str] = (),
    ) -> "Setup":
        """Reads the base model and puts together what a configuration asks for.

        Args:
          config: see `configs/common.py`; checked before (`psa_jax.training.settings.validate`).
          user_dim: D of the profile embeddings.
          flips: whether the shards hold mirrored pictures.
          cached_text: whether the shards hold text states that are to be used.
          devices: to train on; by default those of all processes.
          abstract: models whose weights are not read (`load_stable_diffusion`); the VAE's never are needed.
        """
        mesh = validate_devices(config, devices)
        objective = Objective(**config.objective)
        fixed_draws = fixed_draws_or_none(config.reference.draws, config.reference.seed, objective, flips=flips)
        model = BaseModel.from_config(config).load(
            dtype=config.dtype, sharding=weight_sharding(mesh, config.mesh.frozen), abstract=abstract
        )
        adapter = AdapterConfig.for_unet(model.unet.config, user_dim=user_dim, **config.adapter)
        optimizer = make_optimizer(config.optimizer, config.steps)
        return cls(
            model=model,
            mesh=mesh,
            adapter=adapter,
            objective=objective,
            optimizer=_around_gate(optimizer) if adapter.by_categories else optimizer,
            fixed_draws=fixed_draws,
            cached_text=cached_text,
            accumulate=config.accumulate,
            remat=config.remat,
            ema=config.optimizer.ema,
            frozen_sharding=config.mesh.frozen,
        )

    @property
    def dtype(self) -> Any:
        """The type that the UNet computes in: that of its weights."""
        return self.model.unet.conv_in.kernel.dtype

    @property
    def unet_size(self) -> int:
        """Parameters of the UNet."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model.unet)))

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Options of XLA for programs that run the UNet in training."""
        narrow, device = self.dtype != jnp.float32, self.mesh.devices.flat[0]
        options = NO_EXCESS_PRECISION if narrow else {}
        if device.platform == "tpu" and jax.__version_info__[:2] == SPACE_TO_BATCH_JAX:
            options = options | NO_SPACE_TO_BATCH
            if narrow and device.device_kind in TILES:
                options = options | ROOM_FOR_KERNELS
        if device.platform == "cpu" and self.unet_size >= LARGE:
            options = options | LEAST_MEMORY
        return options or None

    @property
    def batch(self) -> BatchSpec:
        """The arrays that the step takes."""
        return BatchSpec.of_model(
            self.model,
            self.adapter.user_dim,
            fixed_draws=self.fixed_draws is not None,
            cached_text=self.cached_text,
            swap=self.needs_swap,
        )

    @property
    def needs_swap(self) -> bool:
        """Whether the loss has swap distillation."""
        return self.objective.swap_weight > 0.0

    @property
    def divides_frozen(self) -> bool:
        """Whether a device holds a part of the frozen weights only."""
        return self.frozen_sharding == SPLIT and self.mesh.shape[FSDP] > 1

    @property
    def batch_sharding(self) -> dict[str, NamedSharding]:
        """Where each array of a batch lives."""
        return self.batch.places(by_rows(self.mesh), replicated(self.mesh))

    @functools.cached_property
    def state_sharding(self) -> TrainState:
        """Where each array of the state lives."""
        return shardings(self.abstract_state(), self.mesh)

    @property
    def frozen_model_sharding(self) -> Frozen:
        """Where each of the frozen arrays lives."""
        whole = replicated(self.mesh)
        weights = shardings(self._weights(), self.mesh, self.frozen_sharding)
        errors, distance = self.fixed_draws is not None, self.needs_swap
        return Frozen(weights, whole, whole if errors else None, whole if distance else None)

    def init_state(self, seed: int) -> TrainState:
        """The state before the first step, on its devices."""
        state = init_state(self.adapter, self.optimizer, seed, ema=self.ema)
        return jax.device_put(state, self.state_sharding)

    def abstract_state(self) -> TrainState:
        """Shapes of the state."""
        return jax.eval_shape(lambda: init_state(self.adapter, self.optimizer, 0, ema=self.ema))

    def key(self, seed: int) -> jax.Array:
        """The key of a run, on all devices; each step folds its number into it."""
        return jax.jit(lambda: jax.random.key(seed), out_shardings=replicated(self.mesh))()

    def frozen(self) -> Frozen:
        """The frozen arrays on their devices, without those that come from data (`reference_errors`, `swap_distance`).

        They are shapes where the model is abstract.
        """
        weights, alphas = self._weights(), self.schedule.alphas_cumprod
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(weights)):
            alphas = jax.ShapeDtypeStruct(alphas.shape, alphas.dtype)
        where = self.frozen_model_sharding._replace(reference_errors=None, swap_distance=None)
        return jax.tree.map(_place, Frozen(weights, alphas), where)

    def random_frozen(self, rows: int) -> Frozen:
        """The frozen arrays, with 1 for what comes from data: for measuring.

        Args:
          rows: of the data set.
        """
        ones = {name: np.ones(shape, np.float32) for name, shape in self.data_shapes(rows).items()}
        return self.frozen()._replace(**jax.device_put(ones, replicated(self.mesh)))

    def data_shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the frozen arrays that come from a data set of so many rows."""
        shapes = {}
        if self.fixed_draws is not None:
            shapes["reference_errors"] = (rows, self.fixed_draws.count, 2)
        if self.needs_swap:
            shapes["swap_distance"] = (len(TIME_PARTS),)
        return shapes

    def shared_arrays(self, empty_text: dict[str, np.ndarray] | None = None) -> Batch:
        """The arrays of a batch that all pairs share, on all devices: the empty prompt's tokens or text states.

        Args:
          empty_text: `empty_states` and, for SDXL, `empty_pooled`, where text is cached.
        """
        if empty_text is None:
            ids = self.model.token_ids([""])
            empty_text = {name: each[0] for name, each in zip(self.batch.shared_columns, ids, strict=True)}
        return jax.device_put({name: empty_text[name] for name in self.batch.shared_columns}, replicated(self.mesh))

    def frozen_model(self, frozen: Frozen, remat: str | None = None) -> FrozenModel:
        """Rebuilds the base model from its frozen weights; call it inside jit.

        Args:
          frozen: as `frozen()` gives it.
          remat: in place of the set-up's own, such as "none" where there is no backward pass.
        """
        attention = fused_attention(self.mesh, by_rows(self.mesh).spec)
        weights, gather = frozen.weights, None
        if self.divides_frozen:
            gather = functools.partial(constrained, where=replicated(self.mesh))
            weights = whole_but_blocks(weights, gather)
        graph, _ = nnx.split(self._modules())
        unet, text_encoders = nnx.merge(graph, weights)
        unet.compute = ComputeOptions(self.remat if remat is None else remat, attention, gather)
        schedule = dataclasses.replace(self.schedule, alphas_cumprod=frozen.alphas_cumprod)
        return FrozenModel(unet, text_encoders, schedule, self.model.vae.config)

    def _modules(self) -> tuple[Any, tuple[Any, ...]]:
        return self.model.unet, () if self.cached_text else self.model.text_encoders

    def _weights(self) -> nnx.State:
        return nnx.state(self._modules())


def _around_gate(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that leaves the gate by categories as it was fitted: neither a step nor weight decay changes it."""

    def of_gate(arrays: Arrays) -> dict[str, bool]:
        return {name: name.startswith(GATE_NAMES) for name in arrays}

    return optax.chain(optimizer, optax.masked(optax.set_to_zero(), of_gate))


def _place(leaf: Any, where: NamedSharding) -> Any:
    """An array on its devices; a shape with its sharding."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.device_put(leaf, where)
