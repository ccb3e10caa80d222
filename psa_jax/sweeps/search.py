"""A search in place of all points: Optuna proposes values of the generators by what earlier trials measured."""

import importlib.util
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError, Stopped
from psa_jax.evaluation.curves import curves_of, last_value, read_rows
from psa_jax.sweeps.local import DIVERGED, DONE, INTERRUPTED, Outcome
from psa_jax.sweeps.plan import Point

JOURNAL = "search.journal"
"""In the folder of a sweep: all trials."""
_NAME = "psa_jax.sweep"
_REPEATS = 10  # proposals of points that have been tried, before another one is drawn

Train = Callable[[Sequence[Point]], Mapping[Point, Outcome]]


def require_optuna() -> None:
    """Raises PSAError where Optuna is missing, before any training."""
    if importlib.util.find_spec("optuna") is None:
        raise PSAError("--search=optuna needs Optuna: pip install 'psa_jax[search]'")


def search(
    points: Sequence[Point],
    workdir: Path,
    train: Train,
    *,
    metric: str,
    best: str,
    trials: int,
    seed: int,
    at_once: int,
) -> tuple[dict[Point, Outcome], dict[Point, float]]:
    """Tries points until so many different ones have been tried, those of earlier calls included.

    Each key of the points is a parameter whose choices are its values. The sampler is TPE; where it only proposes what
    has been tried, another point is drawn. A point that failed or was cut off is tried again in the next call.

    Args:
      points: what may be tried.
      workdir: of the sweep; gets `search.journal`.
      train: trains points that are tried together, and gives their outcomes.
      metric: that is measured, where its curve ends.
      best: max or min.
      trials: how many.
      seed: of the sampler.
      at_once: points that are tried together.

    Returns:
      Outcomes of the points that were tried in this call, and the values of all that have one.

    Raises:
      PSAError: no Optuna, a journal of other choices, or a metric that a training does not have.
      Stopped: by a signal.
    """
    require_optuna()
    import optuna  # imported late: of the `search` extra
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = _open(workdir / JOURNAL, choices_of(points), best, metric, seed)
    outcomes: dict[Point, Outcome] = {}
    values: dict[Point, float] = {}
    tried: set[Point] = set()
    cut_off: dict[Point, int] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.params.keys() != choices_of(points).keys():  # killed while it was proposed
            if trial.state == TrialState.RUNNING:
                study.tell(trial.number, state=TrialState.FAIL)
            continue
        point = point_of(trial.params, points)
        if trial.state == TrialState.RUNNING:
            cut_off[point] = trial.number
        else:
            tried.add(point)
        if trial.state == TrialState.COMPLETE:
            values[point] = trial.value
    most = min(trials, len(points))
    while cut_off or len(tried) < most:
        batch = dict(list(cut_off.items())[:at_once])
        cut_off = {point: number for point, number in cut_off.items() if point not in batch}
        for _ in range(0 if batch else min(at_once, most - len(tried))):
            number, point = _propose(study, points, tried | batch.keys(), seed)
            batch[point] = number
        found = train(list(batch))
        outcomes |= found
        if any(outcome.state == INTERRUPTED for outcome in found.values()):
            raise Stopped("stopped by a signal; run the same command again, the search goes on")
        for point, number in batch.items():
            tried.add(point)
            if found[point].state == DONE:
                values[point] = value_of(workdir / point.name, metric)
                study.tell(number, values[point])
            elif found[point].state == DIVERGED:
                study.tell(number, state=TrialState.FAIL)
    return outcomes, values


def _propose(study: Any, points: Sequence[Point], tried: Collection[Point], seed: int) -> tuple[int, Point]:
    """Number of a trial and its point, which has not been tried."""
    from optuna.trial import TrialState

    choices = choices_of(points)
    for attempt in range(_REPEATS + 1):
        if attempt == _REPEATS:
            left = [point for point in points if point not in tried]
            study.enqueue_trial(random.Random(seed + len(study.trials)).choice(left).overrides)
        trial = study.ask()
        point = point_of({key: trial.suggest_categorical(key, each) for key, each in choices.items()}, points)
        if point not in tried:
            break
        study.tell(trial.number, state=TrialState.FAIL)  # of failed trials the sampler learns nothing
    return trial.number, point


def choices_of(points: Sequence[Point]) -> dict[str, list[str]]:
    """Key → its values over all points, in their order.

    Raises:
      PSAError: points that are not every combination of the values, as after a zip.
    """
    choices: dict[str, list[str]] = {}
    for point in points:
        for key, text in point.overrides.items():
            if text not in choices.setdefault(key, []):
                choices[key].append(text)
    count = 1
    for each in choices.values():
        count *= len(each)
    if count != len(points):
        raise PSAError(
            f"--search takes every combination of its keys' values, {count}, and these are {len(points)} points; use "
            "generators of one key each, with commas"
        )
    return choices


def point_of(params: Mapping[str, Any], points: Sequence[Point]) -> Point:
    """The point with these values."""
    return next(point for point in points if point.overrides == dict(params))


def value_of(folder: Path, metric: str) -> float:
    """Where a metric of a training ends.

    Raises:
      PSAError: the training does not have it.
    """
    rows = read_rows(folder / "metrics.jsonl")
    curves = curves_of(rows, [metric])
    if metric not in curves:
        known = ", ".join(sorted({key for row in rows for key in row} - {"step", "time", "examples"}))
        raise PSAError(f"--metric={metric}: {folder} has no finite value of it; there are {known}")
    return last_value(curves[metric])


def _open(path: Path, choices: Mapping[str, list[str]], best: str, metric: str, seed: int) -> Any:
    """The study of a journal, made where there is none. The sampler's seed moves on with earlier trials."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(path)))
    goal = "maximize" if best == "max" else "minimize"
    study = optuna.create_study(storage=storage, study_name=_NAME, direction=goal, load_if_exists=True)
    about = {"choices": dict(choices), "metric": metric, "best": best}
    known = study.user_attrs.get("about")
    if known is None:
        study.set_user_attr("about", about)
    elif known != about:
        raise PSAError(
            f"{path}: is of a search with other values, or for {known['best']} of {known['metric']}; give the same "
            "--sweep, --metric and --best, or another --workdir"
        )
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study
