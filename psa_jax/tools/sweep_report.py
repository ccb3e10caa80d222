"""`psa-jax sweep report`: what the points of a sweep measured, as `sweep.csv` and one page, `sweep.html`."""

import json
from argparse import Namespace

import psa_jax
from psa_jax.files import write
from psa_jax.json_input import read_json
from psa_jax.sweeps.page import write_page
from psa_jax.sweeps.plan import PLAN_FILE, recorded
from psa_jax.sweeps.results import best_setting, direction, read_result, require_metric, settings_of, to_csv


def run(args: Namespace) -> int:
    """Writes both files into the sweep's folder, also of one that goes on; the last line on stdout is JSON.

    Raises:
      PSAError: no sweep in the folder, metrics that cannot be read, or a metric that no point has.
    """
    workdir = args.workdir
    results = [read_result(workdir, name, overrides) for name, overrides in recorded(workdir).items()]
    require_metric(results, args.metric)
    best, settings = direction(args.metric, args.best), settings_of(results)
    about = read_json(workdir / PLAN_FILE)
    base = " ".join(f"{key}={text}" for key, text in about["overrides"].items())
    facts = {"Folder": str(workdir), "Configuration": about["config"], "Set for all": base}
    facts["Version"] = f"psa_jax {psa_jax.__version__}"
    write(workdir / "sweep.csv", to_csv(results))
    page = workdir / "sweep.html"
    write_page(page, results, settings, args.metric, best, {name: text for name, text in facts.items() if text})
    winner = best_setting(settings, args.metric, best)
    found = None if winner is None else {"overrides": winner.overrides, **winner.means[args.metric]._asdict()}
    states = {
        state: sum(each.state == state for each in results) for state in ("done", "diverged", "unfinished", "none")
    }
    print(json.dumps({"report": str(page), "metric": args.metric, "best": found, "points": len(results), **states}))
    return 0
