"""A search in place of all points: Optuna proposes values of the generators by what earlier trials measured."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError, Stopped
from psa_jax.evaluation.curves import curves_of, last_value, read_rows
from psa_jax.sweeps.local import DONE, INTERRUPTED, Outcome
from psa_jax.sweeps.plan import Point

JOURNAL = "search.journal"
"""In the folder of a sweep: all trials."""
_NAME = "psa_jax.sweep"

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
    """Tries points until there are so many trials, those of earlier calls included.

    Each key of the points is a parameter whose choices are its values. A trial that was cut off is tried again first. A
    point that is proposed again is not trained again, but counts as a trial. The sampler is TPE.

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
    choices = choices_of(points)
    study = _open(workdir / JOURNAL, choices, best, metric, seed)
    outcomes: dict[Point, Outcome] = {}
    values: dict[Point, float] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        values[point_of(trial.params, points)] = trial.value
    cut_off = [(trial.number, trial.params) for trial in study.get_trials(states=(TrialState.RUNNING,))]
    while cut_off or (left := trials - len(study.get_trials(deepcopy=False))) > 0:
        batch, cut_off = cut_off[:at_once], cut_off[at_once:]
        for _ in range(0 if batch else min(at_once, left)):
            trial = study.ask()
            batch.append((trial.number, {key: trial.suggest_categorical(key, each) for key, each in choices.items()}))
        proposed = {number: point_of(params, points) for number, params in batch}
        new = [point for point in dict.fromkeys(proposed.values()) if point not in outcomes]
        outcomes |= train(new) if new else {}
        for number, point in proposed.items():
            outcome = outcomes[point]
            if outcome.state == INTERRUPTED:
                raise Stopped("stopped by a signal; run the same command again, the search goes on")
            if outcome.state == DONE:
                values[point] = value_of(workdir / point.name, metric)
                study.tell(number, values[point])
            else:
                study.tell(number, state=TrialState.FAIL)
    return outcomes, values


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
