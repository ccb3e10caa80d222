"""Trains an adapter: prepare, restore, run the steps, export."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from psa_jax.errors import PSAError, Stopped
from psa_jax.files import write
from psa_jax.interop.adapter_file import ADAPTER_FILE, find_adapter, read_metadata
from psa_jax.interop.native import adapter_arrays, load_adapter, save_adapter, with_arrays
from psa_jax.paths import local_path
from psa_jax.preference.objective import describe_beta
from psa_jax.progress import Progress, print_on_main, print_stage
from psa_jax.training.cadence import Cadence
from psa_jax.training.checkpoints import Checkpoints
from psa_jax.training.distributed import is_main_process, lost_peers_named
from psa_jax.training.gates import fit_gates
from psa_jax.training.lowered import compile_step
from psa_jax.training.metric_writer import MetricsWriter, Row, require_finite
from psa_jax.training.optimizer import learning_rate_at
from psa_jax.training.preemption import StopSignal, Watchdog
from psa_jax.training.reference import reference_table
from psa_jax.training.run import Run, prepare_run
from psa_jax.training.samples import Samples
from psa_jax.training.sharding import replicated
from psa_jax.training.state import Frozen, Metrics, TrainState
from psa_jax.training.step import make_step
from psa_jax.training.step_timer import StepClock, peak_flops, step_flops
from psa_jax.training.swap import mean_swap_distance

GATE_FILE = "gate.json"
"""In the workdir: how often a fitted gate is right."""


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    *,
    until: int | None = None,
    after_save: Callable[[], None] | None = None,
) -> Path:
    """Trains to `config.steps`, from the last checkpoint in `workdir` where there is one.

    All processes of a group call it; the first one prints and writes. They share `workdir`.

    Args:
      config: see `configs/tiny.py`; `data.shards`, `data.table` and `model` are paths.
      workdir: of checkpoints, metrics, samples and the adapter.
      until: stop (with a checkpoint) at this step instead, as if the machine had been taken away.
      after_save: called by all processes when a checkpoint is whole on the disk.

    Returns:
      The adapter file, `workdir/psa_adapter.safetensors`.

    Raises:
      PSAError: a mistake in the configuration, the data or the base model; a loss that is not finite.
      Stopped: by SIGTERM or SIGINT, with a checkpoint.
    """
    run, cadence = prepare_run(config, workdir), Cadence.from_config(config, until)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.hang_timeout))
        checkpoints = stack.enter_context(_open_checkpoints(run))
        state = restore(run, checkpoints)
        if is_main_process():
            write(workdir / "config.json", run.config.to_json_best_effort(indent=1) + "\n")
        writer = stack.enter_context(_open_writer(run, int(state.step)))
        samples = Samples(run) if cadence.sample_every and is_main_process() else None
        stop = stack.enter_context(StopSignal())
        stack.enter_context(lost_peers_named())
        services = Services(watchdog, checkpoints, writer, samples, stop, after_save)
        frozen = with_reference_errors(run, services)
        if int(state.step) < cadence.end:  # compiling for a run that has ended would be for nothing
            frozen = with_swap_distance(run, frozen)
        state = run_steps(run, services, cadence, state, frozen)
    return export(run, state)


@dataclasses.dataclass(frozen=True, eq=False)
class Services:
    """What accompanies the steps; each is open as long as the run lasts.

    Attributes:
      samples: in the process that generates them, if samples are asked for.
      after_save: called when a checkpoint is whole on the disk.
    """

    watchdog: Watchdog
    checkpoints: Checkpoints
    writer: MetricsWriter
    samples: Samples | None
    stop: StopSignal
    after_save: Callable[[], None] | None = None


def restore(run: Run, checkpoints: Checkpoints) -> TrainState:
    """The state of the last checkpoint, with the data at its position; the initial state where there is none."""
    initial = run.setup.init_state(run.config.seed)
    state = checkpoints.restore(initial, run.iterator)
    if state is None:
        state = _before_the_first_step(run, initial)
    if run.setup.objective.compares_pairs:
        height, width, moments = run.info["latent_shape"]
        print_on_main(describe_beta(run.setup.objective.beta, (height, width, moments // 2)))
    if int(state.step):
        print_on_main(f"resumed at step {int(state.step)}")
    return state


def _before_the_first_step(run: Run, initial: TrainState) -> TrainState:
    if run.config.get("init_from"):
        return with_adapter(run, initial, local_path(run.config.init_from))
    return with_fitted_gate(run, initial) if run.setup.adapter.by_categories else initial


def with_adapter(run: Run, state: TrainState, path: Path) -> TrainState:
    """The initial state with the arrays of an adapter file, its gate included; the optimizer starts anew.

    Args:
      path: native file, or a folder with it.

    Raises:
      PSAError: an adapter for another base model, of another kind or sizes, or for other embeddings.
    """
    found, setup = find_adapter(path), run.setup
    about, unet = read_metadata(found), setup.model.unet.config
    setup.model.require_base_of(found, about)
    if about.get("encoder_fingerprint", run.table.fingerprint) not in run.table.fingerprints:
        raise PSAError(
            f"init_from: {found} was trained with the encoder {about.get('encoder')} ({about['encoder_fingerprint']}), "
            f"the table has {run.table.encoder} ({run.table.fingerprint}); encode the users with that one"
        )
    adapter = load_adapter(found, unet.cross_attentions, unet.cross_attention_dim)
    wanted, given = setup.adapter.as_json(), adapter.config.as_json()
    if not (wanted.get("pooled") and given.get("pooled")):  # a key of config.adapter says whether, not how wide
        wanted, given = ({**one, "pooled": bool(one.get("pooled"))} for one in (wanted, given))
    different = sorted(name for name in wanted | given if wanted.get(name) != given.get(name))
    if different:
        words = ", ".join(f"{name} {given.get(name)} and not {wanted.get(name)}" for name in different)
        raise PSAError(f"init_from: {found} has {words}; set the keys of config.adapter alike")
    print_on_main(f"starting from the adapter {found}")
    params = jax.device_put(adapter_arrays(adapter), setup.state_sharding.params)
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if state.ema else {})


def with_fitted_gate(run: Run, state: TrainState) -> TrainState:
    """The initial state with a gate that is fitted on users and prompts; says and writes how often it is right."""
    print_stage("fitting the gate on users and prompts")
    params, accuracy = fit_gates(run.setup, run.frozen, state.params, run.shards, run.table, run.config.seed)
    print_on_main(
        f"the gate is right about {accuracy.users:.1f} % of what users ban and {accuracy.prompts:.1f} % of prompts, "
        "of users and prompts that were left out"
        + ("" if accuracy.own_bans is None else f"; with bans of their own, {accuracy.own_bans:.1f} %")
    )
    if is_main_process():
        run.workdir.mkdir(parents=True, exist_ok=True)
        write(run.workdir / GATE_FILE, json.dumps(dataclasses.asdict(accuracy)) + "\n")
    average = jax.tree.map(jnp.copy, params) if state.ema else {}
    return state._replace(params=params, ema=average)


def with_reference_errors(run: Run, services: Services) -> Frozen:
    """The frozen arrays with the reference's errors, where the set-up has fixed draws; computed if they are not there.

    Raises:
      Stopped: by a signal; what is computed stays.
    """
    if run.setup.fixed_draws is None:
        return run.frozen

    def between() -> None:
        services.watchdog.alive(0)
        if services.stop.reached():
            raise Stopped("stopped by a signal while the reference ran; run again to go on")

    config = run.config
    errors = reference_table(
        run.setup,
        run.frozen,
        run.shared,
        run.shards,
        run.table,
        Path(config.reference.folder or run.workdir / "reference"),
        batch_size=config.batch_size // config.accumulate,
        between=between,
    )
    services.watchdog.rest()
    return run.frozen._replace(reference_errors=errors)


def with_swap_distance(run: Run, frozen: Frozen) -> Frozen:
    """The frozen arrays with what a swap of the prompt changes, where the loss has swap distillation."""
    if not run.setup.needs_swap:
        return frozen
    size = run.config.batch_size // run.config.accumulate
    distance = mean_swap_distance(run.setup, frozen, run.shared, run.shards, run.table, batch_size=size)
    return frozen._replace(swap_distance=distance)


def run_steps(run: Run, services: Services, cadence: Cadence, state: TrainState, frozen: Frozen) -> TrainState:
    """Runs the steps up to `cadence.end`.

    Raises:
      Stopped: by a signal, with a checkpoint.
    """
    start, batch_size = int(state.step), run.config.batch_size
    if start < cadence.end:
        print_stage(f"compiling the training step of {batch_size} pairs; {cadence.end - start} steps follow")
    step, clock, said = make_step(run.setup), StepClock(batch_size), ""
    keeper = _Keeper(services.checkpoints, services.writer, services.after_save)
    with Progress(cadence.steps, "step", "training", first=start) as progress:
        in_flight = _InFlight(run.workdir)
        for number in range(start, cadence.end):
            with clock.data():
                batch = next(run.iterator) | run.shared
            rows, done, first = batch.pop("rows"), number + 1, number == start
            if first:
                step = compile_step(step, state, frozen, batch, run.key)
                clock = _clock(step, run)
            with jax.transfer_guard("disallow"):  # what a step needs is on the devices before it starts
                state, metrics = step(state, frozen, batch, run.key)
            in_flight.add(done, metrics, rows)
            stopping = services.stop.reached()
            measuring, saving = cadence.measures(done), cadence.saves(done, stopping)
            # One step ahead of the device and no more: it never waits, and the pace seen here is its own. What is saved
            # has been looked at: a state that is not finite never is.
            in_flight.finish(clock.step, ahead=0 if first or measuring or saving else 1)
            services.watchdog.alive(done)
            if first:
                clock.restart()  # without compiling
            measured, accuracy = {}, None
            if measuring:
                with clock.excluded():
                    measured = run.held_out(state.exported, frozen)
                    accuracy = measured["held_out_accuracy"] if saving else None
            if cadence.logs(done):
                written = services.writer.log(done, metrics | measured, **_position(run, number), **clock.read())
                said = said if written is None else _summary(written)
            if saving:
                with clock.excluded():
                    keeper.save(done, state, run.iterator, accuracy, verify=stopping or done == cadence.end)
            if cadence.samples(done):
                with clock.excluded():
                    _generate_samples(run, services.samples, state, done)
            progress.step(note=said)
            if stopping and done < cadence.steps:
                raise Stopped(f"stopped by a signal after step {done}, with a checkpoint; run again to go on")
    return state


def _position(run: Run, number: int) -> dict[str, float]:
    """Where a run is at its step of this number, from 0: learning rate, examples so far, and the time of day."""
    config = run.config
    return {
        "learning_rate": learning_rate_at(config.optimizer, config.steps, number),
        "examples": float((number + 1) * config.batch_size),
        "time": round(time.time(), 1),
    }


def export(run: Run, state: TrainState) -> Path:
    """Writes the adapter file; all processes call it.

    Returns:
      Its path.
    """
    path = run.workdir / ADAPTER_FILE
    params = _on_one_device(state.exported, run.setup.mesh)
    if is_main_process():
        save_adapter(with_arrays(run.setup.adapter, params), path, run.adapter_metadata(int(state.step)))
    return path


class _InFlight:
    """Steps that are given to the device and not looked at yet.

    Args:
      workdir: gets the rows of a batch whose loss is not finite.
    """

    def __init__(self, workdir: Path):
        self._workdir = workdir
        self._steps: list[tuple[int, Metrics, np.ndarray]] = []

    def add(self, step: int, metrics: Metrics, rows: np.ndarray) -> None:
        """A step that the device has been given, and the rows of its batch."""
        self._steps.append((step, metrics, rows))

    def finish(self, on_step: Callable[[], None], ahead: int) -> None:
        """Waits until the device has no more than `ahead` steps to do, and checks that each is finite."""
        while len(self._steps) > ahead:
            require_finite(*self._steps.pop(0), self._workdir)
            on_step()


class _Keeper:
    """Saves checkpoints, and reads the first one of a run back."""

    def __init__(self, checkpoints: Checkpoints, writer: MetricsWriter, after: Callable[[], None] | None = None):
        self._checkpoints, self._writer, self._after, self._verified = checkpoints, writer, after, False

    def save(self, step: int, state: TrainState, iterator: Any, accuracy: float | None, *, verify: bool) -> None:
        """Writes metrics to the disk, then a checkpoint of this step.

        Args:
          verify: read it back even if it is not the first.
        """
        self._writer.sync()
        self._checkpoints.save(step, state, iterator, accuracy)
        if verify or not self._verified:
            self._checkpoints.verify()
            self._verified = True
        if self._after is not None:
            self._checkpoints.wait()
            self._after()


def _open_checkpoints(run: Run) -> Checkpoints:
    return Checkpoints(
        run.workdir / "checkpoints",
        keep=run.config.keep_checkpoints,
        keep_best=run.config.keep_best,
        identity=run.identity,
        renewed=run.renewed_identity,
    )


def _open_writer(run: Run, step: int) -> MetricsWriter:
    wandb = json.loads(run.config.to_json_best_effort()) if run.config.wandb else None
    return MetricsWriter(run.workdir, step, alarm_window=run.config.alarm_window, wandb=wandb)


def _clock(step: Compiled, run: Run) -> StepClock:
    """A clock that knows the step's FLOPs where the device's peak is known."""
    peak = peak_flops()
    if peak is None:
        return StepClock(run.config.batch_size)
    return StepClock(run.config.batch_size, step_flops(step, run.setup.accumulate), peak)


def _generate_samples(run: Run, samples: Samples | None, state: TrainState, step: int) -> None:
    params = _on_one_device(state.exported, run.setup.mesh)
    if samples is not None:
        samples.draw(with_arrays(run.setup.adapter, params), step)


def _on_one_device(params: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Adapter arrays on this process's first device, wherever their parts are; all processes must call it."""
    return jax.device_put(jax.device_get(jax.device_put(params, replicated(mesh))), jax.local_devices()[0])


def _summary(row: Row) -> str:
    pace = f"{row['pairs_per_second']:.1f} pairs/s, " if "pairs_per_second" in row else ""
    said = [f"loss {row['loss']:.3f}"]
    if "accuracy" in row:
        said.append(f"acc {row['accuracy']:.2f}")
    if "swap_learnt_banned" in row:  # a batch may have no banned prompt
        said.append(f"swap learnt {row['swap_learnt_banned']:.2f}")
    return pace + ", ".join(said)
