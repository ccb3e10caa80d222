"""launch/tpu_vm.sh with a gcloud that runs here: what is printed is what is done, and every word arrives as typed."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
WORDS = ["train", "--config=my configs/it's.py:paper", '--config.note=say "hi"; $HOME `id`', "--workdir=/a b/ü\\n", ""]
ARRIVED = [*WORDS, "--coordinator=auto"]
PLACE = ["--name=pod", "--zone=us-east5-a"]
RUN = ["run", *PLACE]

# A worker's home is a folder here; what is told to gcloud and to psa-jax is written to a file, a line each. What gcloud
# answers is in a plan: of every kind of call the answers in turn, the last one for good.
GCLOUD = """#!{python}
import json, subprocess, sys
words = sys.argv[1:]
where = " ".join(word for word in words[2:4])
kind = where + " " + next((word for word in words if word.startswith("--format=")), "")
with open({log!r}) as log:
    before = sum(json.loads(line)[0] == kind for line in log)
with open({log!r}, "a") as log:
    log.write(json.dumps([kind, words]) + "\\n")
with open({plan!r}) as plan:
    answers = json.load(plan).get(kind.strip(), [[0, ""]])
code, text = answers[min(before, len(answers) - 1)]
print(text, file=sys.stderr if code else sys.stdout, flush=True)
for word in words:
    if word.startswith("--command="):
        code = subprocess.run(["sh", "-c", word.removeprefix("--command=")], cwd={home!r}).returncode
sys.exit(code)
"""
PSA_JAX = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(3)
"""
CREATE, DELETE = "queued-resources create", "queued-resources delete"
QUEUE, NODE = "queued-resources describe --format=value(state.state)", "tpu-vm describe --format=value(state)"
MESSAGE = "queued-resources describe --format=value(state.failedData.error.message)"
NO_QUOTA = [1, "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProjectPerZone' has been exceeded."]


def executable(path: Path, text: str, **values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(python=sys.executable, **values))
    path.chmod(0o755)
    return path


@pytest.fixture
def worker(tmp_path):
    """Folder with the home of a worker, where the project is installed, and a gcloud that reaches it."""
    home, log, plan = tmp_path / "home", tmp_path / "gcloud.log", tmp_path / "plan.json"
    executable(tmp_path / "bin" / "gcloud", GCLOUD, log=str(log), plan=str(plan), home=str(home))
    executable(home / "psa_jax" / ".venv" / "bin" / "psa-jax", PSA_JAX, log=str(tmp_path / "psa.log"))
    (home / "psa_jax" / "launch").mkdir()
    shutil.copy(LAUNCH / "tpu_job.sh", home / "psa_jax" / "launch")
    log.touch()
    plan.write_text("{}")
    return tmp_path


def launch(worker: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{worker / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(worker)}
    return subprocess.run([LAUNCH / "tpu_vm.sh", *words], capture_output=True, text=True, env=environment)


def planned(worker: Path, **answers: list) -> None:
    """Sets what gcloud answers: names of the constants above in small letters."""
    (worker / "plan.json").write_text(json.dumps({globals()[name.upper()]: each for name, each in answers.items()}))


def calls(worker: Path) -> list[list[str]]:
    return [json.loads(line)[1] for line in (worker / "gcloud.log").read_text().splitlines()]


def kinds(worker: Path) -> list[str]:
    return [json.loads(line)[0].strip() for line in (worker / "gcloud.log").read_text().splitlines()]


def states(*names: str) -> list:
    return [[0, name] for name in names]


def wait_for(path: Path) -> str:
    for _ in range(100):
        if path.exists() and path.read_text():
            break
        time.sleep(0.1)
    return path.read_text()


def test_an_attached_command_arrives_word_for_word(worker):
    done = launch(worker, *RUN, "--project=p", "--no-install", "--attach", "--", "psa-jax", *WORDS)
    assert done.returncode == 3  # of the command on the worker
    assert json.loads((worker / "psa.log").read_text()) == ARRIVED
    ((*call, _),) = calls(worker)
    wanted = ["compute", "tpus", "tpu-vm", "ssh"] + ["pod", "--zone=us-east5-a", "--project=p", "--worker=all"]
    assert call == wanted


def test_a_command_goes_on_without_the_connection_and_is_logged(worker):
    assert launch(worker, *RUN, "--no-install", "--", ".venv/bin/psa-jax", *WORDS).returncode == 0
    assert wait_for(worker / "home" / "psa_jax" / "job.exit") == "3\n"
    assert json.loads((worker / "psa.log").read_text()) == ARRIVED
    done = launch(worker, "logs", *PLACE)
    assert done.stdout.endswith("tpu_job.sh: ended with exit code 3 after start 1\n")
    assert launch(worker, "logs", *PLACE, "--worker=all", "--follow", "--dry-run").stdout.endswith(
        "'--worker=all' '--command=tail -f -n 100 psa_jax/run.log'\n"
    )


def test_a_coordinator_that_is_given_stays(worker):
    words = ["train", "--coordinator=10.0.0.1:99", "--num-processes=1", "--process-id=0"]
    launch(worker, *RUN, "--no-install", "--attach", "--", "psa-jax", *words)
    launch(worker, *RUN, "--no-install", "--attach", "--", "psa-jax", "build", "SAGE")
    assert list(map(json.loads, (worker / "psa.log").read_text().splitlines())) == [words, ["build", "SAGE"]]


def test_without_an_action_it_does_what_it_did(worker):
    done = launch(worker, *PLACE, "--no-install", "--", *WORDS)
    assert done.returncode == 3 and "no action: this is taken as run --attach" in done.stderr
    assert json.loads((worker / "psa.log").read_text()) == ARRIVED


def test_a_dry_run_prints_what_would_be_done_and_does_nothing(worker):
    done = launch(worker, *RUN, "--dry-run", "--python=3.11", "--", "psa-jax", *WORDS)
    assert done.returncode == 0, done.stderr
    assert calls(worker) == [] and not (worker / "psa.log").exists()
    assert sorted(path.name for path in worker.iterdir()) == ["bin", "gcloud.log", "home", "plan.json"]

    # Read by a shell, the printed lines are three calls of gcloud after one of tar.
    words = shlex.split(done.stdout)
    at = [i for i, word in enumerate(words) if word == "gcloud"]
    assert words[0] == "tar" and {"psa_jax", "configs", "launch", "setup.py", "constraints.txt"} <= set(words[: at[0]])
    copy, install, start = (words[i + 4 : j] for i, j in zip(at, [*at[1:], len(words)], strict=True))
    assert copy[0] == "scp" and copy[2] == "pod:psa_jax.tar.gz" and "--worker=all" in copy
    assert install[0] == start[0] == "ssh" and "--worker=all" in install
    assert install[-1].removeprefix("--command=").splitlines() == [
        "set -eu",
        "mkdir -p psa_jax",
        "tar -xzf psa_jax.tar.gz -C psa_jax",
        "cd psa_jax",
        "test -x .uv/bin/uv || python3 -m pip install --quiet --target=.uv uv==0.13.9",
        ".uv/bin/uv python install --quiet 3.11",
        ".uv/bin/uv venv --quiet --allow-existing --python=3.11 .venv",
        ".uv/bin/uv pip install --quiet --python=.venv/bin/python --constraints=constraints.txt '.[tpu]'",
    ]
    started = ["cd", "psa_jax", "&&", "launch/tpu_job.sh", "start", *ARRIVED]
    assert shlex.split(start[-1].removeprefix("--command=")) == started


def test_all_workers_of_several_slices(worker):
    done = launch(worker, *RUN, "--dry-run", "--slices=2", "--", "psa-jax", *WORDS)
    lines = [line for line in done.stdout.splitlines() if line.startswith("'gcloud'")]
    assert len(lines) == 3
    assert all("'queued-resources' 's" in line and "'--node=all' '--worker=all'" in line for line in lines)
    assert "'--node=0' '--worker=0'" in launch(worker, "logs", *PLACE, "--slices=2", "--dry-run").stdout


def installed(worker: Path, version: str) -> str:
    """All but the installation itself: a uv that is there stands for it. What it is asked to do."""
    executable(worker / "home" / "psa_jax" / ".uv" / "bin" / "uv", f'#!/bin/sh\necho "$@" >>{worker}/uv.log\n')
    kept = worker / "home" / "psa_jax.tar.gz"
    gcloud = (worker / "bin" / "gcloud").read_text()
    copying = f"if 'scp' in words:\n    import shutil; shutil.copy(words[4], {str(kept)!r})\n"
    (worker / "bin" / "gcloud").write_text(gcloud.replace("for word in words:\n", copying + "for word in words:\n"))
    done = launch(worker, *RUN, f"--python={version}", "--attach", "--", "psa-jax", "train")
    assert done.returncode == 3, done.stderr
    return (worker / "uv.log").read_text()


def test_the_archive_holds_what_an_installation_needs(worker):
    installed(worker, "3.12")
    home = worker / "home" / "psa_jax"
    for name in (
        "setup.py",
        "constraints.txt",
        "constraints-py312.txt",
        "configs/sd15.py",
        "launch/tpu_job.sh",
        "psa_jax/cli.py",
        "psa_jax/assets/base_model_metrics.json",
    ):
        assert (home / name).is_file(), name
    assert not any(path.is_dir() and path.name.startswith("psa_jax.") for path in worker.iterdir())  # cleaned up


@pytest.mark.parametrize(
    ("version", "file"),
    [("3.11", "constraints.txt"), ("3.12", "constraints-py312.txt"), ("3.13", "constraints-py312.txt")],
)
def test_a_worker_gets_a_python_of_its_own_and_its_constraints(worker, version, file):
    assert installed(worker, version).splitlines() == [
        f"python install --quiet {version}",
        f"venv --quiet --allow-existing --python={version} .venv",
        f"pip install --quiet --python=.venv/bin/python --constraints={file} .[tpu]",
    ]


@pytest.mark.parametrize(("flags", "wanted"), [
    (["--type=v6e-16", "--spot"], ["v6e-16", "v2-alpha-tpuv6e", "--node-id=pod", "--spot"]),
    (["--type=v5litepod-8", "--reserved"], ["v5litepod-8", "v2-alpha-tpuv5-lite", "--node-id=pod", "--reserved"]),
    (
        ["--type=v5p-32", "--slices=2", "--valid-until=6h"],
        ["v5p-32", "v2-alpha-tpuv5", "--node-count=2", "--node-prefix=pod", "--valid-until-duration=6h"],
    ),
])  # fmt: skip
def test_what_is_asked_for(worker, flags, wanted):
    printed = launch(worker, "create", *PLACE, *flags, "--dry-run")
    assert calls(worker) == [] and launch(worker, "create", *PLACE, *flags).returncode == 0
    (call,) = calls(worker)
    assert shlex.split(printed.stdout) == ["gcloud", *call]
    kind, runtime, *rest = wanted
    startup = f"--metadata-from-file=startup-script={LAUNCH / 'tpu_startup.sh'}"
    about = [f"--accelerator-type={kind}", f"--runtime-version={runtime}", *rest, startup]
    assert call == ["compute", "tpus", "queued-resources", "create", "pod", "--zone=us-east5-a", *about]


V6E = ["create", *PLACE, "--type=v6e-16", "--pause=0"]


def test_quota_that_is_used_up_is_asked_for_again(worker):
    planned(worker, create=[NO_QUOTA, NO_QUOTA, [0, "Created"]])
    done = launch(worker, *V6E)
    assert done.returncode == 0 and kinds(worker) == [CREATE] * 3
    assert done.stderr.count("the quota is used up; attempt ") == 2 and "Created" in done.stdout


def test_but_not_for_ever(worker):
    planned(worker, create=[NO_QUOTA])
    done = launch(worker, *V6E, "--tries=3")
    assert done.returncode == 1 and kinds(worker) == [CREATE] * 3
    assert "the quota is still used up after 3 attempts; pod was not created" in done.stderr


def test_another_error_is_final(worker):
    planned(worker, create=[[1, "ERROR: (gcloud) PERMISSION_DENIED"]])
    done = launch(worker, *V6E)
    assert done.returncode == 1 and kinds(worker) == [CREATE] and "PERMISSION_DENIED" in done.stderr


def test_waiting_until_it_is_there(worker):
    planned(worker, queue=states("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"), node=states("CREATING", "READY"))
    done = launch(worker, *V6E, "--wait")
    assert done.returncode == 0, done.stderr
    shown = ["WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING", "ACTIVE"]
    assert [line.removeprefix("pod: ") for line in done.stdout.split("\n") if line.startswith("pod: ")] == shown
    assert kinds(worker) == [CREATE, QUEUE, QUEUE, QUEUE, NODE, QUEUE, NODE]


@pytest.mark.parametrize(("queue", "node", "code", "said"), [
    ("SUSPENDED", "", 75, "pod was taken away, and is deleted since it counted against the quota"),
    ("ACTIVE", "PREEMPTED", 75, "pod was taken away"),
    ("ACTIVE", "TERMINATED", 75, "pod was taken away"),
    ("FAILED", "", 1, "no capacity in the zone\ntpu_vm.sh: error: pod has failed and was deleted"),
])  # fmt: skip
@pytest.mark.parametrize("action", [["status", *PLACE], [*V6E, "--wait"]], ids=["status", "create"])
def test_what_is_of_no_use_any_more_is_deleted_and_said(worker, action, queue, node, code, said):
    planned(worker, queue=states(queue), node=states(node), message=states("no capacity in the zone"))
    done = launch(worker, *action)
    assert done.returncode == code and said in done.stderr
    assert kinds(worker)[-1] == DELETE and kinds(worker).count(DELETE) == 1
    assert calls(worker)[-1][4:] == ["pod", "--zone=us-east5-a", "--force", "--quiet"]


@pytest.mark.parametrize("state", ["WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING", "ACTIVE"])
def test_what_is_of_use_stays(worker, state):
    planned(worker, queue=states(state), node=states("READY"))
    done = launch(worker, "status", *PLACE)
    assert done.returncode == 0 and done.stdout == f"pod: {state}\n" and DELETE not in kinds(worker)


def test_a_deletion_that_fails_is_not_called_done(worker):
    planned(worker, queue=states("SUSPENDED"), delete=[[1, "ERROR: (gcloud) UNAVAILABLE"]])
    done = launch(worker, "status", *PLACE)
    assert done.returncode == 1 and "UNAVAILABLE" in done.stderr and "is deleted" not in done.stderr


def test_one_that_gcloud_does_not_know(worker):
    planned(worker, queue=[[1, "ERROR: (gcloud) NOT_FOUND"]])
    done = launch(worker, "status", *PLACE)
    assert done.returncode == 1 and "NOT_FOUND" in done.stderr and kinds(worker) == [QUEUE]


@pytest.mark.parametrize("action", [["create", "--type=v6e-16", "--wait"], ["status"], ["logs"], ["stop"], ["delete"]])
def test_a_dry_run_of_every_action_calls_nothing(worker, action):
    done = launch(worker, *action, *PLACE, "--dry-run")
    assert done.returncode == 0 and done.stdout.startswith("'gcloud' 'compute' 'tpus' '") and calls(worker) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--zone=z", "--", "psa-jax", "train"], "no TPU; give --name=TPU"),
        (["run", "--name=n", "--", "psa-jax", "train"], "no zone"),
        (RUN, "no command"),
        ([*RUN, "--"], "no command"),
        ([*RUN, "train"], "unknown option train"),
        ([*RUN, "--", "train"], "train is not psa-jax; give its command after --: -- psa-jax train"),
        ([*RUN, "--", "bash", "-c", "psa-jax train"], "bash is not psa-jax"),
        ([*RUN, "--", "psa-jax"], "psa-jax alone does nothing"),
        ([*RUN, "--python=python3.11", "--", "psa-jax", "train"], "--python=python3.11: give 3.11, 3.12 or 3.13"),
        (["run", "--name=Pod one", "--zone=z", "--", "psa-jax", "train"], "--name=Pod one: give small letters"),
        (["start", *PLACE], "start is no action"),
        ([], "nothing is no action"),
        (["create", *PLACE], "no type; give --type=TYPE"),
        (["create", *PLACE, "--type=v7x-8"], "newer chips are on GKE: launch/gke.py"),
        (["create", *PLACE, "--type=v6e-"], "--type=v6e-: give a number after the dash"),
        (["create", *PLACE, "--type=v6e-8", "--spot", "--reserved"], "--spot --reserved: give one of them"),
        (["create", *PLACE, "--type=v6e-8", "--", "psa-jax", "train"], "a command is for run, not for create"),
        (["create", *PLACE, "--type=v6e-8", "--tries=many"], "--tries=many: give a number"),
        (["create", *PLACE, "--type=v6e-8", "--slices=0"], "--slices and --tries must be at least 1"),
        (["logs", *PLACE, "--worker=1;id"], "--worker=1;id: give a number or all"),
    ],
)
def test_wrong_usage(worker, words, message):
    done = launch(worker, *words)
    assert done.returncode == 2 and message in done.stderr
    assert calls(worker) == []


def test_without_gcloud(tmp_path):
    for name in ("bash", "env", "dirname"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    command = [LAUNCH / "tpu_vm.sh", "status", *PLACE]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == "tpu_vm.sh: error: gcloud not found; install the Google Cloud CLI\n"


def test_help():
    done = subprocess.run([LAUNCH / "tpu_vm.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--dry-run" in done.stdout and "older way" not in done.stderr
