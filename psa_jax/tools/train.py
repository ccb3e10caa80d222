"""`psa-jax train`: trains an adapter. Renders SAGE-mini first if the configuration has no data of its own."""

import contextlib
import json
import logging
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from psa_jax.leaving import on_failure
from psa_jax.mini.prepare import with_mini
from psa_jax.paths import Address
from psa_jax.progress import print_on_main
from psa_jax.training.distributed import (
    connect,
    hard_exit,
    is_main_process,
    join,
    lost_peers_named,
    require_joined,
)
from psa_jax.training.loop import train
from psa_jax.training.mirror import Mirror
from psa_jax.training.settings import validate, validate_devices


def run(args: Namespace) -> int:
    """Trains; the last line names the adapter and the last metrics."""
    on_failure(hard_exit)
    _hush_orbax()
    mirror = Mirror(args.workdir) if isinstance(args.workdir, Address) else None
    workdir = args.workdir if mirror is None else mirror.folder
    if args.init_from is not None:
        with args.config.unlocked():
            args.config.init_from = str(args.init_from)
    if args.print_config:
        print(args.config.to_json_best_effort(indent=1))
    validate(args.config, "train", workdir)
    if args.print_config:
        return 0
    join(args.coordinator, args.num_processes, args.process_id)
    require_joined()
    with lost_peers_named():
        connect(validate_devices(args.config))
        with contextlib.nullcontext() if mirror is None else mirror:
            path = _train(args.config, workdir, None if mirror is None else mirror.push)
    if is_main_process():
        last = json.loads((workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        print(json.dumps({"adapter": str(path if mirror is None else f"{mirror.address}/{path.name}"), **last}))
    return 0


def _train(config: ml_collections.ConfigDict, workdir: Path, after_save: Callable[[], None] | None) -> Path:
    if config.data.shards and config.data.mini.users:
        print_on_main(f"training on {config.data.shards}; data.mini is ignored")
    return train(with_mini(config, workdir / "data"), workdir, after_save=after_save)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info


def _hush_orbax() -> None:
    """Orbax raises what goes wrong; before that, each of its threads shows it with a traceback. Warnings stay."""
    logging.getLogger("absl").addFilter(_has_no_traceback)
    show = sys.unraisablehook

    def hook(found: Any) -> None:
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(found.exc_traceback)]
        if str(found.exc_value) != "Event loop is closed" and not any("orbax" in file for file in files):
            show(found)

    sys.unraisablehook = hook
