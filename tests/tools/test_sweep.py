"""`psa-jax sweep`: the plan comes first; what is skipped, started again, given up; a real one in little."""

import fcntl
import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest
from support.sweep_runs import StandIn

from psa_jax.cli import main
from psa_jax.interop.adapter_file import read_metadata
from psa_jax.mini.prepare import prepare
from psa_jax.sweeps import launchers
from psa_jax.tools import configs
from psa_jax.tools.configs import read_config, read_sweep
from psa_jax.training.settings import validate

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OWN = """
import psa_jax.tools.configs as tools

def get_config(arg=""):
    return tools.read_config("tiny:dpo-smoke", [("data.shards", "{data}/shards"), ("data.table", "{data}/table")])

def sweep():
    yield {{"seed": 5}}

def sweep_beta():
    yield {{"objective.beta": 30.0}}
    yield {{"objective.beta": 60.0}}

def sweep_two():
    yield {{"seed": 0}}
    yield {{"seed": 1}}

def sweep_wrong():
    yield {{"objective.bta": 1.0}}

def sweep_huge():
    yield {{"optimizer.ema": 1.5}}

def sweep_odd():
    yield "seed"

def sweep_none():
    return iter(())
"""


@pytest.fixture
def own(tmp_path):
    """A configuration with its own data, whose files nobody reads here, and its own sweeps."""
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / "fingerprint.json").touch()
    (tmp_path / "data" / "table").touch()
    path = tmp_path / "own.py"
    path.write_text(OWN.format(data=tmp_path / "data"))
    return path


@pytest.fixture
def standin(own, tmp_path, monkeypatch):
    """Returns a function: plan -> the stand-in that trains from the own configuration."""

    def make(**plan):
        made = StandIn(tmp_path / "standin", json.loads(read_config(str(own)).to_json_best_effort()), plan)
        made.use(monkeypatch)
        return made

    return make


@pytest.fixture
def sweep(own, tmp_path, capsys):
    """Runs the command: exit code, last line of stdout, lines of stderr."""

    def run(*words, of="beta,two"):
        capsys.readouterr()
        code = main(["sweep", f"--config={own}", f"--sweep={of}", f"--workdir={tmp_path / 'w'}", *words])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out.strip() else None, err.splitlines()

    return run


NAMES = [f"beta={beta},seed={seed}" for beta in ("30.0", "60.0") for seed in (0, 1)]


def test_two_by_two(standin, sweep, tmp_path):
    made = standin()
    code, last, err = sweep("--jobs=2")
    assert (code, last) == (0, {"points": 4, "done": 4, "diverged": [], "failed": [], "workdir": str(tmp_path / "w")})
    assert err[:2] == ["psa-jax: 4 points:", f"  {NAMES[0]}: objective.beta=30.0 seed=0"]
    assert err.index(f"psa-jax: {NAMES[0]}: started") > 4  # the plan comes first
    calls = made.calls
    assert sorted(words[-1] for words in calls) == [f"--workdir={tmp_path / 'w' / name}" for name in NAMES]
    assert calls[0][0] == "train" and "--config.objective.beta=30.0" in calls[0]
    assert (tmp_path / "w" / NAMES[0] / "log.txt").read_text().startswith("$ ")

    code, last, err = sweep()
    assert (code, last["done"], made.calls) == (0, 4, [])
    assert f"psa-jax: {NAMES[3]}: done before, skipped" in err


def test_what_was_stopped_goes_on_and_what_diverged_is_given_up(standin, sweep, tmp_path):
    made = standin(**{NAMES[0]: ["75", "75", "0"], NAMES[1]: ["nan"], NAMES[2]: ["1", "0"]})
    code, last, err = sweep()
    assert code == 1 and last["done"] == 2
    assert (last["diverged"], last["failed"]) == ([NAMES[1]], [NAMES[2]])
    assert [words[-1].rpartition("/")[2] for words in made.calls] == [NAMES[0]] * 3 + NAMES[1:]
    assert f"psa-jax: {NAMES[0]}: stopped with a checkpoint of step 2; started again" in err
    assert any(f"{NAMES[1]}: diverged after" in line and "step 2: loss is nan" in line for line in err)
    assert any(f"{NAMES[2]}: failed after" in line and "the disk is full; see " in line for line in err)
    assert err[-2:] == [
        f"psa-jax: diverged and given up: {NAMES[1]}",
        f"psa-jax: failed: {NAMES[2]}; see {tmp_path / 'w' / NAMES[2] / 'log.txt'}",
    ]
    # Again: only what failed is trained.
    code, last, err = sweep()
    assert (code, last["done"], last["diverged"], last["failed"]) == (0, 3, [NAMES[1]], [])
    assert [words[-1].rpartition("/")[2] for words in made.calls] == [NAMES[2]]
    assert f"psa-jax: {NAMES[1]}: diverged before, given up; delete its folder to try it again" in err


def test_a_signal_stops_all_and_the_same_command_goes_on(standin, sweep, tmp_path):
    made = standin(**{NAMES[1]: ["wait", "0"]})
    log = tmp_path / "w" / NAMES[1] / "log.txt"

    def send() -> None:
        while not log.exists() or b"\nwaiting" not in log.read_bytes():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    code, last, err = sweep()
    assert (code, last) == (75, None)
    assert err[-1] == "psa-jax: error: stopped by a signal; 3 of 4 points are left; run the same command again"
    assert len(made.calls) == 2
    assert sweep()[1]["done"] == 4 and len(made.calls) == 3


def test_a_search_tries_some_of_them(standin, sweep, tmp_path):
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    made = standin(**{NAMES[0]: ["nan"]})
    code, last, err = sweep("--search=optuna", "--trials=3")
    tried = {words[-1].rpartition("/")[2] for words in made.calls}
    assert code == 0 and len(tried) == last["points"] == 3
    code, last, err = sweep("--search=optuna", "--trials=30")
    assert code == 0 and tried | {words[-1].rpartition("/")[2] for words in made.calls} == set(NAMES)
    # The stand-in's loss is β/60 + seed/10, and the point that has the least of both diverges.
    assert f"psa-jax: best loss so far: 0.6 with {NAMES[1]}" in err
    code, _, (line,) = sweep("--search=optuna", "--trials=3", of="beta+two")
    assert code == 1 and "--search takes every combination" in line


def test_flags_of_the_base_model_are_those_of_train(own, tmp_path, capsys):
    words = ["sweep", f"--config={own}", "--sweep=two", f"--workdir={tmp_path / 'w'}", "--launcher=print"]
    assert main([*words, "--model=tiny"]) == 0
    assert all(" --config.model=tiny " in line for line in capsys.readouterr().out.splitlines())
    assert main([*words, "--model=/nowhere"]) == 1
    assert "point seed=0: model is /nowhere, which is not there" in capsys.readouterr().err


def test_points_are_added_and_others_stay(standin, sweep, tmp_path):
    made = standin()
    assert sweep(of="two")[1]["points"] == 2
    assert sweep(of="beta")[1]["points"] == 2
    assert len(made.calls) == 4
    assert len(json.loads((tmp_path / "w" / "sweep.json").read_text())["points"]) == 4


def test_a_folder_of_another_configuration_is_one_line(standin, sweep, tmp_path):
    made = standin()
    sweep(of="two")
    path = tmp_path / "w" / "seed=1" / "config.json"
    changed = json.loads(path.read_text())
    changed["objective"]["beta"] = 7.5
    path.write_text(json.dumps(changed))
    made.calls  # noqa: B018  forgets them
    code, last, err = sweep(of="two")
    assert (code, last, made.calls) == (1, None, [])
    beta = read_config("tiny:dpo-smoke").objective.beta
    assert err[-1] == (
        f"psa-jax: error: {tmp_path / 'w' / 'seed=1'}: holds a run of another configuration, objective.beta 7.5 and "
        f"not {beta}; give another --workdir, or delete this folder"
    )
    code, _, err = sweep("--config.steps=9", of="two")
    assert code == 1 and "steps 4 and not 9" in err[-1]


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("wrong", "point bta=1.0: --config.objective.bta: .*has no key objective.bta; did you mean objective.beta?"),
        ("huge", "point ema=1.5: optimizer.ema is 1.5; give a finite number of 0 or more and below 1"),
        ("beta+learning_rate", "--sweep=beta+learning_rate: beta has 2, learning_rate has 3 values; "),
        ("btea", "own.py nor "),
        ("odd", "own.py: sweep_odd yields 'seed'; yield {key: value}, such as {'seed': 1}"),
        ("none", "own.py: sweep_none yields nothing; yield {key: value} for each value"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be(standin, sweep, tmp_path, of, said):
    made = standin()
    code, last, err = sweep(of=of)
    assert (code, last, made.calls) == (1, None, []) and len(err) == 1
    assert said.replace(".*", "") in err[0] or all(part in err[0] for part in said.split(".*"))
    assert not (tmp_path / "w").exists()


def test_a_generator_that_is_not_there_names_its_neighbour(sweep):
    _, _, (line,) = sweep(of="seeds")
    assert "has sweep_seeds(); did you mean seed? there are banned_share, batch_size, beta, ema, " in line


def test_flags_that_do_not_go_together(standin, sweep, tmp_path):
    standin()
    for words, said in [
        (["--launcher-args=x"], "--launcher-args are for slurm, jobset, sky"),
        (["--launcher=slurm", "--jobs=2"], "--jobs, --cores and --search are of --launcher=local"),
        (["--search=optuna"], "--search and --trials go together"),
    ]:
        code, _, (line,) = sweep(*words)
        assert code == 1 and said in line


def test_two_sweeps_in_one_folder(standin, sweep, tmp_path):
    made = standin()
    (tmp_path / "w").mkdir()
    with (tmp_path / "w" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = sweep()
    assert code == 1 and "another psa-jax sweep is at work there" in err[-1] and made.calls == []


def test_printed_commands_are_what_local_runs(standin, own, tmp_path, capsys):
    words = ["sweep", f"--config={own}", "--sweep", f"--workdir={tmp_path / 'a b'}", "--config.model=tiny"]
    assert main([*words, "--launcher=print"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    made = standin()
    assert main(words) == 0
    assert [shlex.split(line)] == [["psa-jax", *call] for call in made.calls]
    assert shlex.split(line)[2:5] == [f"--config={own}", "--config.model=tiny", "--config.seed=5"]
    assert main([*words, "--launcher=print"]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == []  # it is done: nothing is left but the line of before


def test_what_points_share_is_made_first(tmp_path, capsys):
    """SAGE-mini and the reference's errors: printed as a command of their own, before the others, which name them."""
    words = ["sweep", "--config=tiny:dpo-smoke", "--config.reference.draws=2", f"--workdir={tmp_path}"]
    assert main([*words, "--sweep=seed", "--launcher=print"]) == 0
    first, *points = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert first == ["psa-jax", *words[:3], "--sweep=seed", "--prepare=all", words[3]]
    (data,) = {word for point in points for word in point if word.startswith("--config.data.shards=")}
    assert len(points) == 3 and data.startswith(f"--config.data.shards={tmp_path}/shared/mini-40-1-")
    assert all(f"--config.reference.folder={tmp_path}/shared/reference" in point for point in points)
    main([*words, "--sweep=seed", "--launcher=print", "--config.data.mini.seed=2"])
    assert data not in capsys.readouterr().out


def test_a_scheduler_gets_each_point_once(standin, sweep, tmp_path, monkeypatch):
    standin()
    fake = tmp_path / "launch" / "slurm.sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho job 7\n')
    fake.chmod(0o755)
    (tmp_path / "sbatch").symlink_to("/bin/true")
    monkeypatch.setattr(launchers, "LAUNCH", tmp_path / "launch")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    code, last, err = sweep("--launcher=slurm", "--launcher-args=--time=5", of="two")
    assert (code, last) == (0, {"points": 2, "handed_over": 2, "before": 0})
    assert err[-1] == "psa-jax: seed=1: job 7"
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert " --time=5 -- psa-jax train --config=" in first
    assert second.endswith(f"--config.seed=1 --workdir={tmp_path}/w/seed=1")
    code, last, err = sweep("--launcher=slurm", of="two")
    assert (
        last == {"points": 2, "handed_over": 0, "before": 2}
        and "was handed over before; if it is not queued" in err[-1]
    )


@pytest.fixture(scope="module")
def trained(small_pipeline, tmp_path_factory):
    """A sweep of real trainings of the smallest model: one learns, the other has an endless learning rate."""
    root, model = tmp_path_factory.mktemp("real"), small_pipeline[1]
    prepare(root / "data", model, users=8, seed=3, resolution=32, splits=("train",))
    own = root / "own.py"
    own.write_text(
        "import psa_jax.tools.configs as tools\n"
        "def get_config(arg=''):\n"
        "    return tools.read_config('tiny:dpo-smoke')\n"
        "def sweep_rate():\n"
        "    yield {'optimizer.learning_rate': 1e-3}\n"
        "    yield {'optimizer.learning_rate': 1e38}\n"
    )
    settings = {"model": model.folder, "data.shards": root / "data" / "shards", "steps": 2, "batch_size": 2}
    settings |= {"data.table": root / "data" / "table.safetensors", "data.balance": "none", "log_every": 1}
    words = ["sweep", f"--config={own}", "--sweep=rate", f"--workdir={root / 'w'}"]
    return root, [*words, *(f"--config.{key}={value}" for key, value in settings.items())]


@pytest.mark.slow
def test_a_real_sweep(trained, monkeypatch, capsys):
    root, words = trained
    monkeypatch.setenv("PYTHONPATH", str(CONFIGS.parent))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    code = main(words)
    out, err = capsys.readouterr()
    last = json.loads(out.splitlines()[-1])
    assert (code, last["done"], last["diverged"], last["failed"]) == (0, 1, ["learning_rate=1e+38"], []), err
    assert "step 2: update_norm is inf" in err
    done = root / "w" / "learning_rate=0.001"
    assert read_metadata(done / "psa_adapter.safetensors")["steps"] == 2
    assert json.loads((done / "log.txt").read_text().splitlines()[-1])["step"] == 2  # the last line of `train`
    assert main(words) == 0
    assert "learning_rate=0.001: done before, skipped" in capsys.readouterr().err
    assert main(["sweep", "report", str(root / "w")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    losses = [row["loss"] for row in map(json.loads, (done / "metrics.jsonl").read_text().splitlines())]
    assert report["best"]["mean"] == pytest.approx(losses[-1]) and (report["done"], report["diverged"]) == (1, 1)


@pytest.mark.parametrize("name", [name for name in vars(configs._load_module(CONFIGS / "sweeps" / "usual.py"))
                                  if name.startswith("sweep_")])  # fmt: skip
def test_the_usual_sweeps_suit_the_shipped_configurations(name, tmp_path):
    """Every value of each is a configuration that can be trained."""
    for source in ("tiny:dpo", "tiny"):
        config = read_config(source)
        if source == "tiny" and name in ("sweep_beta", "sweep_sft_weight", "sweep_loss", "sweep_tokens"):
            continue  # swap distillation of a kind without tokens
        values = read_sweep(source, name.removeprefix("sweep_"), config)
        assert 3 <= len(values) <= 5
        for value in values:
            validate(read_config(source, [(key, str(each)) for key, each in value.items()]), "train", tmp_path / "x")


def test_a_configuration_is_printed(tmp_path, capsys):
    words = ["train", "--config=tiny:dpo-smoke", "--config.steps=7", "--print-config"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(read_config("tiny:dpo-smoke", [("steps", "7")]).to_json_best_effort())
    assert main([*words, f"--workdir={tmp_path / 'run'}"]) == 0 and not (tmp_path / "run").exists()
    capsys.readouterr()
    assert main([*words, "--config.optimizer.ema=2"]) == 1  # what cannot be trained is printed, and said
    out, err = capsys.readouterr()
    assert json.loads(out)["optimizer"]["ema"] == 2.0 and "optimizer.ema is 2.0" in err
    with pytest.raises(SystemExit) as leaving:
        main(words[:2])
    assert leaving.value.code == 2 and "--workdir" in capsys.readouterr().err
