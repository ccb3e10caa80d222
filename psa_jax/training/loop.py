"""Trains an adapter: reads top to bottom."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

import psa_jax
from psa_jax.data.fingerprints import vae_fingerprint
from psa_jax.data.pipeline import make_pipeline, to_devices
from psa_jax.data.shards import Shards, open_shards, preprocess_of, read_info
from psa_jax.data.validation import validation_batches
from psa_jax.diffusion.schedule import NoiseSchedule
from psa_jax.errors import PSAError, Stopped
from psa_jax.interop.adapter_file import ADAPTER_FILE
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import StableDiffusion
from psa_jax.interop.native import save_adapter, with_arrays
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.preference.objective import Objective, describe_beta
from psa_jax.preference.pair_loss import batch_arrays
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.progress import Progress, print_on_main, print_stage
from psa_jax.training.checkpoints import Checkpoints
from psa_jax.training.distributed import connect, is_main_process, lost_peers_named, require_joined
from psa_jax.training.held_out import HeldOut
from psa_jax.training.metric_writer import MetricsWriter, Row, require_finite
from psa_jax.training.optimizer import make_optimizer
from psa_jax.training.preemption import StopSignal, Watchdog
from psa_jax.training.reference import reference_table, stored_or_none
from psa_jax.training.samples import Samples
from psa_jax.training.settings import validate, validate_devices
from psa_jax.training.sharding import by_rows, of_file, replicated, shardings
from psa_jax.training.step import Metrics, compiled, init_state, make_step
from psa_jax.training.step_timer import StepClock, peak_flops, step_flops


def train(config: ml_collections.ConfigDict, workdir: Path, *, until: int | None = None) -> Path:
    """Trains to `config.steps`, going on from the last checkpoint in `workdir`.

    All processes of a group call it; the first one prints and writes. They share `workdir`.

    Args:
      config: see `configs/tiny.py`; `data.shards`, `data.table` and `model` are paths.
      until: stop (with a checkpoint) at this step instead, as if the machine had been taken away.

    Returns:
      The adapter file, `workdir/psa_adapter.safetensors`.

    Raises:
      Stopped: by SIGTERM or SIGINT, with a checkpoint.
    """
    # --- base model, data, adapter
    validate(config, "train", workdir)
    require_joined()
    mesh = validate_devices(config)
    connect(mesh)
    # What can be wrong with the data is said before the weights are read.
    shards, table = Path(config.data.shards), EmbeddingTable.load(Path(config.data.table))
    info = read_info(shards)
    for split in ("train", *(["val"] if config.validate.every or config.sample_every else [])):
        if split not in info["splits"]:
            raise PSAError(f"{shards}: no split {split!r} in the shards; they have {', '.join(sorted(info['splits']))}")
    print_stage(f"reading the base model {config.model}")
    where, drawing = of_file(mesh, config.mesh.frozen), config.sample_every > 0
    model = BaseModel.from_config(config).load(dtype=config.dtype, sharding=where, abstract=() if drawing else ("vae",))
    base_hash = model.base_hash
    adapter_config = AdapterConfig.for_unet(
        model.unet.config,
        user_dim=table.dim,
        kind=config.adapter.kind,
        tokens=config.adapter.tokens,
        qk_dim=config.adapter.qk_dim,
    )
    objective = Objective(**config.objective)
    vae = vae_fingerprint(model.vae_tensors, preprocess_of(info))
    stored = stored_or_none(config.reference.draws, config.reference.seed, objective, flips=info["flips"])
    of_pairs, of_all = batch_arrays(len(model.text_encoders), stored is not None)
    place = to_devices(by_rows(mesh), of_pairs)
    rows = open_shards(shards, "train", vae)
    pipeline = make_pipeline(
        rows,
        table,
        batch_size=config.batch_size,
        seed=config.seed,
        balance=config.data.balance,
        safe_share=config.data.safe_share,
        flips=info["flips"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        place=lambda batch: place(batch) | {"rows": batch["row"]},
    )
    iterator = iter(pipeline)

    # --- state
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = init_state(adapter_config, optimizer, config.seed, ema=config.optimizer.ema)
    state = jax.device_put(state, shardings(state, mesh))
    step_fn, frozen = make_step(
        model,
        adapter_config,
        objective,
        optimizer,
        mesh,
        accumulate=config.accumulate,
        remat=config.remat,
        ema=config.optimizer.ema,
        frozen=config.mesh.frozen,
        stored=stored,
    )
    identity = {
        "base_model": base_hash,
        "shards": info["inputs"],
        "encoder": table.fingerprint,
        **{k: config[k].to_dict() for k in ("adapter", "objective", "optimizer")},
        "order": {k: config.data[k] for k in ("balance", "safe_share")},
        "reference": {k: config.reference[k] for k in ("draws", "seed")},
        **{k: config[k] for k in ("seed", "batch_size", "steps", "dtype")},
    }
    key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(mesh))()
    empty = dict(zip(of_all, (ids[0] for ids in model.token_ids([""])), strict=True))
    empty = jax.device_put(empty, replicated(mesh))
    held_out = None
    if config.validate.every:
        batches = held_out_batches(config, open_shards(shards, "val", vae), table, model, by_rows(mesh))
        held_out = HeldOut(model, adapter_config, objective, mesh, [batch | empty for batch in batches], key)

    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.hang_timeout))
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints",
                keep=config.keep_checkpoints,
                keep_best=config.keep_best,
                identity=identity,
                # Earlier versions knew the base model by the bytes of its files.
                renewed=lambda saved: saved | ({"base_model": base_hash} if model.is_base_of(saved) else {}),
            )
        )
        state = checkpoints.restore(state, iterator) or state
        start = int(state.step)
        height, width, moments = info["latent_shape"]
        print_on_main(describe_beta(objective.beta, (height, width, moments // 2)))
        if start:
            print_on_main(f"resumed at step {start}")
        writer = stack.enter_context(
            MetricsWriter(
                workdir,
                start,
                alarm_window=config.alarm_window,
                wandb=json.loads(config.to_json_best_effort()) if config.wandb else None,
            )
        )
        samples = Samples(config, model, table, workdir) if config.sample_every and is_main_process() else None
        stop = stack.enter_context(StopSignal())
        stack.enter_context(lost_peers_named())

        # --- reference, where its errors are stored
        if stored is not None:

            def between() -> None:
                watchdog.alive(0)
                if stop.reached():
                    raise Stopped("stopped by a signal while the reference ran; run again to go on")

            errors = reference_table(
                Path(config.reference.folder or workdir / "reference"),
                stored,
                model,
                objective,
                frozen,
                rows,
                table,
                mesh,
                empty=empty,
                batch_size=config.batch_size // config.accumulate,
                base_hash=base_hash,
                between=between,
            )
            frozen = frozen._replace(reference=errors)
            watchdog.rest()

        # --- steps
        end = config.steps if until is None else min(until, config.steps)
        if start < end:
            print_stage(f"compiling the training step of {config.batch_size} pairs; {end - start} steps follow")
        progress = stack.enter_context(Progress(config.steps, "step", "training", first=start))
        said = ""
        clock, peak = StepClock(config.batch_size), peak_flops()
        running: list[tuple[int, Metrics, np.ndarray]] = []
        verified = False

        def finish(ahead: int) -> None:
            """Waits until the device has no more than `ahead` steps to do, and looks at what it has done."""
            while len(running) > ahead:
                require_finite(*running.pop(0), workdir)
                clock.step()

        for number in range(start, end):
            with clock.data():
                batch = next(iterator) | empty
            numbers, done = batch.pop("rows"), number + 1
            if number == start:
                step_fn = compiled(step_fn, state, frozen, batch, key)
                if peak is not None:
                    clock = StepClock(config.batch_size, step_flops(step_fn, config.accumulate), peak)
            with jax.transfer_guard("disallow"):  # what a step needs is on the devices before it starts
                state, metrics = step_fn(state, frozen, batch, key)
            running.append((done, metrics, numbers))
            last, stopping = done == config.steps, stop.reached()
            measuring = held_out is not None and (done % config.validate.every == 0 or last)
            saving = stopping or done % config.checkpoint_every == 0 or done == end
            # One step ahead of the device and no more: it never waits, and the pace seen here is its own. What is saved
            # has been looked at: a state that is not finite never is.
            finish(ahead=0 if number == start or measuring or saving else 1)
            watchdog.alive(done)
            if number == start:
                clock.restart()  # without compiling
            measured, accuracy = {}, None
            if measuring:
                with clock.excluded():
                    measured = held_out(state.exported, frozen)
                    accuracy = float(jax.device_get(measured["held_out_accuracy"])) if saving else None
            if done % config.log_every == 0 or number == 0 or last or measuring:
                written = writer.log(done, metrics | measured, **clock.read())
                if written is not None:
                    said = _summary(written)
            if saving:
                with clock.excluded():
                    writer.sync()
                    checkpoints.save(done, state, iterator, accuracy)
                    if not verified or stopping or done == end:  # the first of a run, and what is said to be there
                        checkpoints.verify()
                        verified = True
            if config.sample_every and (done % config.sample_every == 0 or last):
                with clock.excluded():
                    params = _whole(state.exported, mesh)
                    if samples is not None:
                        samples.draw(with_arrays(adapter_config, params), done)
            progress.step(note=said)
            if stopping and not last:
                raise Stopped(f"stopped by a signal after step {done}, with a checkpoint; run again to go on")

    # --- result
    path = workdir / ADAPTER_FILE
    params = _whole(state.exported, mesh)
    if is_main_process():
        save_adapter(
            with_arrays(adapter_config, params),
            path,
            adapter_metadata(config, model.family, base_hash=base_hash, table=table, steps=int(state.step)),
        )
    return path


def held_out_batches(
    config: ml_collections.ConfigDict,
    shards: Shards,
    table: EmbeddingTable,
    model: StableDiffusion,
    sharding: jax.sharding.Sharding,
) -> list[dict[str, jax.Array]]:
    """Whole batches of up to `validate.rows` rows, on their devices, without what only fills up."""
    size = config.validate.batch_size
    rows = min(config.validate.rows, len(shards)) // size * size
    if not rows:
        more = " or raise validate.rows" if len(shards) >= size else ""
        raise PSAError(
            f"validate: {min(config.validate.rows, len(shards))} held-out rows do not fill a batch of {size}; "
            f"lower validate.batch_size{more}"
        )
    names = (*batch_arrays(len(model.text_encoders))[0], "noise", "timesteps")
    return list(
        validation_batches(
            shards,
            table,
            batch_size=size,
            seed=config.seed,
            rows=rows,
            timesteps=NoiseSchedule.from_config(model.scheduler_config).steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            place=to_devices(sharding, names),
        )
    )


def _whole(params: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
    """Adapter arrays on this process's own device, wherever their parts are; all processes must ask."""
    return jax.device_put(jax.device_get(jax.device_put(params, replicated(mesh))), jax.local_devices()[0])


def _summary(row: Row) -> str:
    pace = f"{row['pairs_per_second']:.1f} pairs/s, " if "pairs_per_second" in row else ""
    return f"{pace}loss {row['loss']:.3f}, acc {row['accuracy']:.2f}"


def adapter_metadata(
    config: ml_collections.ConfigDict, family: str, *, base_hash: str, table: EmbeddingTable, steps: int
) -> dict[str, Any]:
    """What a user of the file must know: base model, encoder, recipe, versions."""
    return {
        "base_model": base_hash,
        "family": family,
        "encoder": table.encoder,
        "encoder_fingerprint": table.fingerprint,
        "standardised": table.mean is not None,
        "objective": config.objective.to_dict(),
        "ema": config.optimizer.ema,
        "dtype": config.dtype,
        "steps": steps,
        "seed": config.seed,
        "versions": {"psa_jax": psa_jax.__version__, "jax": jax.__version__},
    }
