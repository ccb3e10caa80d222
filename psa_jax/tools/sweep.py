"""`psa-jax sweep`: trains the points of a sweep: what is done is skipped, what was stopped goes on."""

import fcntl
import functools
import json
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections

from psa_jax.errors import PSAError, Stopped
from psa_jax.paths import check_workdir
from psa_jax.progress import print_stage
from psa_jax.sweeps import launchers, shared
from psa_jax.sweeps.local import DIVERGED, DONE, FAILED, INTERRUPTED, Job, Outcome, run_jobs
from psa_jax.sweeps.plan import LOG_FILE, Point, describe, points_of, record
from psa_jax.sweeps.points import DIVERGED as HAS_DIVERGED
from psa_jax.sweeps.points import DONE as IS_DONE
from psa_jax.sweeps.points import state_of
from psa_jax.sweeps.results import direction
from psa_jax.sweeps.search import choices_of, require_optuna, search
from psa_jax.tools.arguments import BASE_MODEL
from psa_jax.tools.configs import read_config, read_sweep, split_config
from psa_jax.training.settings import validate

LOCK_FILE = ".lock"


class Sweep(NamedTuple):
    """What a call asks for.

    Attributes:
      source: of the configuration.
      base: what every point changes in it.
      expression: of the generators.
      workdir: of the points.
      configs: for each point its configuration, without what points share.
    """

    source: str
    base: list[tuple[str, str]]
    expression: str
    workdir: Path
    configs: dict[Point, ml_collections.ConfigDict]

    def overrides(self, point: Point) -> list[tuple[str, str]]:
        """All that is changed for a point but what it shares."""
        return [*self.base, *point.overrides.items()]

    def words(self, point: Point) -> list[str]:
        """The words after `psa-jax` that train a point."""
        common = shared.shared_overrides(self.configs[point], self.workdir)
        return launchers.train_words(self.source, [*self.overrides(point), *common], self.workdir / point.name)

    def prepare_words(self, *, reference: bool) -> list[str]:
        """The words after `psa-jax` that only make what the points share."""
        base = [f"--config.{key}={text}" for key, text in self.base]
        what = f"--prepare={'all' if reference else 'data'}"
        return [
            "sweep",
            f"--config={self.source}",
            *base,
            f"--sweep={self.expression}",
            what,
            f"--workdir={self.workdir}",
        ]


def run(args: Namespace) -> int:
    """Checks every point, prints the plan, and hands the points to the launcher.

    Raises:
      PSAError: a sweep, a point or a flag that cannot be used, or another sweep at work in the folder.
      Stopped: by a signal; the points saved, and the same command goes on.
    """
    source, base, _ = split_config(args.words)
    base += [(name, str(vars(args)[name])) for name in BASE_MODEL if vars(args).get(name)]
    _check_flags(args)
    points = points_of(args.sweep, lambda name: read_sweep(source, name, args.config))
    configs = {point: _config(source, base, point, args.workdir) for point in points}
    sweep = Sweep(source, base, args.sweep, args.workdir, configs)
    if args.search:
        require_optuna()
        choices_of(points)
    if args.prepare:
        _prepare(sweep, reference=args.prepare == "all")
        print(json.dumps({"shared": str(args.workdir / shared.SHARED)}))
        return 0
    print_stage(describe(points))
    states = {point: state_of(args.workdir / point.name, sweep.configs[point]) for point in points}
    if args.launcher in launchers.SCHEDULERS:
        launchers.require_scheduler(args.launcher)
    args.workdir.mkdir(parents=True, exist_ok=True)
    with (args.workdir / LOCK_FILE).open("w") as lock:
        _lock(lock, args.workdir)
        record(args.workdir, source, base, points)
        if args.launcher == "print":
            return _print(sweep, states)
        if args.launcher != "local":
            return _hand_over(sweep, states, args)
        if args.search:
            return _search(sweep, states, args)
        return _finish(_train(sweep, states, points, args), args.workdir)


def _check_flags(args: Namespace) -> None:
    schedules = args.launcher in launchers.SCHEDULERS
    if args.launcher_args and not schedules:
        raise PSAError(f"--launcher-args are for {', '.join(launchers.SCHEDULERS)}; leave them out")
    if args.launcher != "local" and (args.jobs > 1 or args.cores or args.search):
        raise PSAError("--jobs, --cores and --search are of --launcher=local; a scheduler has its own limits")
    if bool(args.search) != bool(args.trials):
        raise PSAError("--search and --trials go together; write such as --search=optuna --trials=20")
    check_workdir(args.workdir)


def _config(source: str, base: Sequence[tuple[str, str]], point: Point, workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of a point, checked as `psa-jax train` checks it."""
    try:
        config = read_config(source, [*base, *point.overrides.items()])
        validate(config, "train", workdir / point.name)
    except PSAError as error:
        raise PSAError(f"point {point.name}: {error}") from error
    return config


def _lock(lock, workdir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise PSAError(
            f"{workdir}: another psa-jax sweep is at work there; wait for its end, or give another --workdir"
        ) from error


# --- what points share


def _prepare(sweep: Sweep, *, reference: bool) -> None:
    """Makes in this process what is missing of what the points share."""
    for config in shared.missing(list(sweep.configs.values()), sweep.workdir, reference=reference):
        point = next(point for point, each in sweep.configs.items() if each is config)
        overrides = [*sweep.overrides(point), *shared.shared_overrides(config, sweep.workdir)]
        shared.prepare(
            config, functools.partial(read_config, sweep.source, overrides), sweep.workdir, reference=reference
        )


def _prepare_apart(sweep: Sweep, points: Sequence[Point], *, reference: bool) -> None:
    """The same in a process of its own: this one must not take the devices that the points need."""
    configs = [sweep.configs[point] for point in points]
    if not shared.missing(configs, sweep.workdir, reference=reference):
        return
    print_stage(f"making what the points share, in {sweep.workdir / shared.SHARED}")
    words, folder = sweep.prepare_words(reference=reference), sweep.workdir / shared.SHARED
    found = run_jobs([Job(shared.SHARED, folder, [*launchers.HERE, *words])])[shared.SHARED]
    if found.state == INTERRUPTED:
        raise Stopped("stopped by a signal; run the same command again to go on")
    if found.state != DONE:
        raise PSAError(f"what the points share could not be made: {found.said}")


# --- launchers


def _print(sweep: Sweep, states: dict[Point, str]) -> int:
    """Prints a command a line, to be run in this order by a shell; nothing is started."""
    waiting = [point for point, state in states.items() if state not in (IS_DONE, HAS_DIVERGED)]
    configs = [sweep.configs[point] for point in waiting]
    if shared.missing(configs, sweep.workdir, reference=True):
        print(shlex.join(["psa-jax", *sweep.prepare_words(reference=True)]))
    for point in waiting:
        print(shlex.join(["psa-jax", *sweep.words(point)]))
    return 0


def _hand_over(sweep: Sweep, states: dict[Point, str], args: Namespace) -> int:
    """Gives every point that is not done to a scheduler, once."""
    left = [point for point, state in states.items() if state not in (IS_DONE, HAS_DIVERGED)]
    before = [point for point in left if (args.workdir / point.name / launchers.HANDED_OVER).exists()]
    for point in before:
        print_stage(
            f"{point.name}: was handed over before; if it is not queued any more, delete "
            f"{args.workdir / point.name / launchers.HANDED_OVER} to hand it over again"
        )
    waiting = [point for point in left if point not in before]
    if waiting:
        _prepare_apart(sweep, waiting, reference=False)
    for point in waiting:
        words, folder = ["psa-jax", *sweep.words(point)], args.workdir / point.name
        job = launchers.handed(args.launcher, point, words, folder, args.launcher_args)
        print_stage(f"{point.name}: {launchers.hand_over(job)}")
    print(json.dumps({"points": len(states), "handed_over": len(waiting), "before": len(before)}))
    return 0


def _train(sweep: Sweep, states: dict[Point, str], points: Sequence[Point], args: Namespace) -> dict[Point, Outcome]:
    """Trains points here; those that are done or have diverged are not trained again."""
    found, waiting = {}, []
    for point in points:
        if states[point] == IS_DONE:
            found[point] = Outcome(DONE, "done before, skipped")
        elif states[point] == HAS_DIVERGED:
            found[point] = Outcome(DIVERGED, "diverged before, given up; delete its folder to try it again")
        else:
            waiting.append(point)
    for point, outcome in found.items():
        print_stage(f"{point.name}: {outcome.said}")
    if waiting:
        _prepare_apart(sweep, waiting, reference=True)
    jobs = [Job(point.name, sweep.workdir / point.name, [*launchers.HERE, *sweep.words(point)]) for point in waiting]
    outcomes = run_jobs(jobs, args.jobs, args.cores)
    for point in waiting:
        found[point] = outcomes[point.name]
        states[point] = {DONE: IS_DONE, DIVERGED: HAS_DIVERGED}.get(found[point].state, states[point])
    return {point: found[point] for point in points}


def _search(sweep: Sweep, states: dict[Point, str], args: Namespace) -> int:
    """Tries points as a search proposes them."""
    best = direction(args.metric, args.best)
    outcomes, values = search(
        list(states),
        args.workdir,
        lambda points: _train(sweep, states, points, args),
        metric=args.metric,
        best=best,
        trials=args.trials,
        seed=args.search_seed,
        at_once=args.jobs,
    )
    for point in sorted(values, key=lambda point: values[point], reverse=best == "max")[:1]:
        print_stage(f"best {args.metric} so far: {values[point]:.4g} with {point.name}")
    return _finish(outcomes, args.workdir)


def _finish(outcomes: dict[Point, Outcome], workdir: Path) -> int:
    """Says how it ended. Exit code 1 where a point failed for another reason than that it diverged."""
    by_state = {
        state: [point.name for point, outcome in outcomes.items() if outcome.state == state]
        for state in (DONE, DIVERGED, FAILED, INTERRUPTED)
    }
    if by_state[INTERRUPTED]:
        left = len(by_state[INTERRUPTED])
        raise Stopped(f"stopped by a signal; {left} of {len(outcomes)} points are left; run the same command again")
    if by_state[DIVERGED]:
        print_stage(f"diverged and given up: {'; '.join(by_state[DIVERGED])}")
    for name in by_state[FAILED]:
        print_stage(f"failed: {name}; see {workdir / name / LOG_FILE}")
    counts = {"points": len(outcomes), "done": len(by_state[DONE])}
    print(json.dumps(counts | {name: by_state[name] for name in (DIVERGED, FAILED)} | {"workdir": str(workdir)}))
    return 1 if by_state[FAILED] else 0
