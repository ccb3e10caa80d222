"""launch/gke.py: the JobSet is what JobSet takes, and what cannot run is refused before anything starts."""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

LAUNCHER = Path(__file__).resolve().parents[2] / "launch" / "gke.py"
SCHEMAS = json.loads(Path(__file__).with_name("jobset_schemas.json").read_text())
INSTALLED_BY_XPK, TODAY = "v0.10.1", "main of August 2026"
BASE = {"name": "sage", "chip": "v6e", "topology": "4x4", "image": "registry.example/psa-jax:1", "queue": "team"}
WORDS = ["psa-jax", "train", "--config=sd15", "--workdir=/mnt/share/run"]
ALL = ["--namespace=work", "--slices=2", "--spot", "--volume=share:/mnt/share", "--volume=data:/mnt/data"]
ALL += ["--service-account=trainer", "--restarts=7"]

# What is applied, read by a person once: the smallest job.
SMALLEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: sage
  labels:
    kueue.x-k8s.io/queue-name: team
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 3
    rules:
    - name: stopped
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: psa-jax
    replicas: 1
    template:
      spec:
        parallelism: 1
        completions: 1
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
              status: 'True'
          - action: FailJob
            onExitCodes:
              containerName: psa-jax
              operator: In
              values:
              - 75
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 60
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
              cloud.google.com/gke-tpu-topology: 2x2
              node.kubernetes.io/instance-type: ct5lp-hightpu-4t
            tolerations:
            - key: google.com/tpu
              operator: Exists
              effect: NoSchedule
            containers:
            - name: psa-jax
              image: registry.example/psa-jax:1
              securityContext:
                runAsUser: 0
              command:
              - psa-jax
              - evaluate
              - pictures
              env:
              - name: JAX_PLATFORMS
                value: tpu,cpu
              resources:
                requests:
                  google.com/tpu: 4
                limits:
                  google.com/tpu: 4
              volumeMounts:
              - name: shm
                mountPath: /dev/shm
            volumes:
            - name: shm
              emptyDir:
                medium: Memory
"""


def launch(*flags: str, command: list[str] = WORDS, path: str | None = None, **changed: str):
    """Runs the launcher with BASE, `changed` and a volume for the run."""
    base = [f"--{name}={text}" for name, text in (BASE | changed).items()]
    words = [sys.executable, str(LAUNCHER), *base, *flags, "--", *command]
    environment = os.environ if path is None else os.environ | {"PATH": path}
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def rendered(*flags: str, command: list[str] = WORDS, **changed: str) -> dict:
    done = launch(*flags, command=command, **changed)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def slice_of(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def pod_of(jobset: dict) -> dict:
    return slice_of(jobset)["template"]["spec"]


def test_the_smallest_job_word_for_word():
    flags = {"chip": "v5e", "topology": "2x2"}
    done = launch("--dry-run", command=["psa-jax", "evaluate", "pictures"], **flags)
    assert done.stdout == SMALLEST, done.stderr
    assert launch(command=["psa-jax", "evaluate", "pictures"], **flags).stdout == SMALLEST  # it is the default


@pytest.mark.parametrize("version", [INSTALLED_BY_XPK, TODAY])
@pytest.mark.parametrize("flags", [["--volume=share:/mnt/share"], ALL], ids=["least", "all"])
def test_jobset_takes_it(version, flags):
    jsonschema.validate(rendered(*flags), SCHEMAS[version])


def test_what_jobset_would_not_take_is_seen():
    """The schemas tell versions apart, and see a field that there is not."""
    jobset = rendered(*ALL)
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    rule["action"] = "RestartJobAndIgnoreMaxRestarts"
    jsonschema.validate(jobset, SCHEMAS[TODAY])
    with pytest.raises(jsonschema.ValidationError, match="RestartJobAndIgnoreMaxRestarts"):
        jsonschema.validate(jobset, SCHEMAS[INSTALLED_BY_XPK])
    for change in (
        lambda pod: pod.update(terminationGracePeriod=60),
        lambda pod: pod["containers"][0].update(command="psa-jax train"),
        lambda pod: pod.pop("containers"),
        lambda pod: pod["nodeSelector"].update({"cloud.google.com/gke-spot": True}),
    ):
        changed = copy.deepcopy(rendered(*ALL))
        change(pod_of(changed))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed, SCHEMAS[TODAY])


@pytest.mark.parametrize(("chip", "topology", "hosts", "accelerator", "machine"), [
    ("v5e", "2x2", 1, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
    ("v5e", "2x4", 2, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
    ("v5e", "16x16", 64, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t"),
    ("v6e", "4x8", 8, "tpu-v6e-slice", "ct6e-standard-4t"),
    ("v5p", "2x2x1", 1, "tpu-v5p-slice", "ct5p-hightpu-4t"),
    ("v5p", "2x2x4", 4, "tpu-v5p-slice", "ct5p-hightpu-4t"),
    ("v5p", "4x4x8", 32, "tpu-v5p-slice", "ct5p-hightpu-4t"),
])  # fmt: skip
def test_a_slice_has_a_pod_for_every_four_chips(chip, topology, hosts, accelerator, machine):
    jobset = rendered("--volume=share:/mnt/share", chip=chip, topology=topology)
    assert slice_of(jobset)["parallelism"] == slice_of(jobset)["completions"] == hosts
    assert pod_of(jobset)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
        "node.kubernetes.io/instance-type": machine,
    }


def test_a_stopped_or_moved_run_is_started_again_and_a_failure_counts():
    jobset = rendered("--volume=share:/mnt/share", "--restarts=7")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    ]
    # PodFailurePolicy is the reason of these two alone; without a rule, the reason is the limit of 0 retries.
    moved, stopped = slice_of(jobset)["podFailurePolicy"]["rules"]
    assert moved["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (container,) = pod_of(jobset)["containers"]
    assert stopped["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert slice_of(jobset)["backoffLimit"] == 0 and pod_of(jobset)["restartPolicy"] == "Never"


def test_slices_spot_nodes_and_volumes():
    jobset = rendered(*ALL)
    pod = pod_of(jobset)
    assert jobset["metadata"]["namespace"] == "work" and jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert pod["terminationGracePeriodSeconds"] == 15 and pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [each["key"] for each in pod["tolerations"]] == ["google.com/tpu", "cloud.google.com/gke-spot"]
    assert pod["hostNetwork"] is True and "hostNetwork" not in pod_of(rendered("--volume=share:/mnt/share"))
    claims = {each["name"]: each.get("persistentVolumeClaim", {}).get("claimName") for each in pod["volumes"]}
    mounted = {each["mountPath"]: claims[each["name"]] for each in pod["containers"][0]["volumeMounts"]}
    assert mounted == {"/dev/shm": None, "/mnt/share": "share", "/mnt/data": "data"}
    assert pod_of(rendered(*ALL, "--grace=120"))["terminationGracePeriodSeconds"] == 120


def expanded(word: str) -> str:
    """What Kubernetes makes of a word of a command, as its documentation has it, where no variable is set."""
    return re.sub(r"\$\$", "$", word)


def test_the_command_arrives_word_for_word():
    words = [*WORDS, '--config.note=$(HOME) $$ `id` "x" it\'s', "yes", "1.0", "", "two\nlines", "ü # no comment: {a}"]
    (container,) = pod_of(rendered("--volume=share:/mnt/share", command=words))["containers"]
    assert [expanded(word) for word in container["command"]] == [*words, "--coordinator=auto"]
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", container["command"][4])  # no $(…) that would be replaced
    given = [*WORDS, "--coordinator=10.0.0.1:1234"]
    assert pod_of(rendered("--volume=share:/mnt/share", command=given))["containers"][0]["command"] == given
    other = ["/opt/venv/bin/psa-jax", "build", "SAGE"]
    assert pod_of(rendered(command=other))["containers"][0]["command"] == other  # of train alone, many join


def test_a_bucket_needs_no_volume():
    words = ["psa-jax", "train", "--config=sd15", "--workdir", "gs://bucket/run"]
    pod = slice_of(rendered(command=words))["template"]["spec"]
    assert "volumeMounts" not in pod["containers"][0] or "share" not in str(pod["containers"][0]["volumeMounts"])
    assert pod["containers"][0]["command"] == [*words, "--coordinator=auto"]
    done = launch(command=["psa-jax", "sweep", "--workdir=gs://bucket/run"])  # which takes none
    assert done.returncode == 2 and "gs://bucket/run is on no volume" in done.stderr


@pytest.mark.parametrize(("flags", "changed", "message"), [
    ([], {"topology": "3x3"}, "--topology=3x3: v6e has no such slice, but 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
    ([], {"topology": "4x2"}, "--topology=4x2: v6e has no such slice"),
    ([], {"chip": "v5p"}, "--topology=4x4: v5p has no such slice, but 2x2x1"),
    ([], {"chip": "v7"}, "argument --chip: invalid choice"),
    ([], {"name": "Sage"}, "--name=Sage: Kubernetes takes small letters"),
    ([], {"name": "2sage"}, "begin with a letter, end with one (RFC 1035)"),
    ([], {"name": "sage-"}, "--name=sage-: Kubernetes"),
    (["--volume=a:/mnt"], {"name": "s" * 46}, "has 46 characters; at most 45 are taken"),
    ([], {"queue": "my_queue"}, "--queue=my_queue: Kubernetes"),
    ([], {"queue": "a..b"}, "--queue=a..b: Kubernetes"),
    ([], {"image": ""}, "--image=: give the name of an image"),
    ([], {"image": "a b"}, "--image=a b: give the name of an image"),
    (["--namespace=A"], {}, "--namespace=A: Kubernetes"),
    (["--service-account=a b"], {}, "--service-account=a b: Kubernetes"),
    (["--volume=share"], {}, "--volume=share: give CLAIM:PATH"),
    (["--volume=share:mnt"], {}, "--volume=share:mnt: give CLAIM:PATH"),
    (["--volume=share:/a/../b"], {}, "give CLAIM:PATH"),
    (["--volume=Share:/mnt"], {}, "--volume=Share: Kubernetes"),
    (["--volume=a:/mnt/share", "--volume=b:/mnt/share"], {}, "two are mounted at one path"),
    (["--slices=0"], {}, "--slices and --grace must be at least 1"),
    (["--grace=0"], {}, "--slices and --grace must be at least 1"),
    (["--restarts=-1"], {}, "--restarts at least 0"),
    ([], {}, "--workdir=/mnt/share/run is on no volume and would be gone with its pod"),
    (["--volume=a:/mnt/sha"], {}, "--workdir=/mnt/share/run is on no volume"),
    (["--dry-run", "--apply"], {}, "not allowed with argument"),
])  # fmt: skip
def test_what_cannot_run_is_refused(flags, changed, message):
    done = launch(*flags, **changed)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    "command",
    [["bash", "-c", "psa-jax train"], ["train"], ["psa-jax"], ["psa-jax", "--help"], ["not-psa-jax", "train"]],
)
def test_a_command_that_is_not_psa_jax(command):
    done = launch(command=command)
    assert done.returncode == 2 and "give psa-jax and its command after --: -- psa-jax train" in done.stderr


def test_the_longest_name_that_is_taken_makes_names_of_63():
    longest = f"{'s' * 45}-psa-jax-0-3-abcde"
    assert len(longest) == 63 and rendered("--volume=a:/mnt", name="s" * 45)["metadata"]["name"] == "s" * 45
    many = ["--volume=a:/mnt", "--slices=11"]  # indices of two digits
    assert launch(*many, name="s" * 45).returncode == 2 and launch(*many, name="s" * 44).returncode == 0


KUBECTL = """#!{python}
import json, sys
with open({log!r}, "w") as log:
    json.dump([sys.argv[1:], sys.stdin.read()], log)
sys.exit(int({code!r}))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_apply_hands_kubectl_what_is_printed(tmp_path, code):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL.format(python=sys.executable, log=str(tmp_path / "log"), code=code))
    kubectl.chmod(0o755)
    done = launch("--volume=share:/mnt/share", "--apply", path=str(tmp_path))
    assert done.returncode == code and done.stdout == ""
    words, read = json.loads((tmp_path / "log").read_text())
    assert words == ["apply", "-f", "-"] and read == launch("--volume=share:/mnt/share").stdout


def test_apply_without_kubectl(tmp_path):
    done = launch("--volume=share:/mnt/share", "--apply", path=str(tmp_path))
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("gke.py: error: kubectl not found;")


def test_without_pyyaml(tmp_path):
    (tmp_path / "yaml.py").write_text("raise ImportError('no yaml')")
    words = [sys.executable, LAUNCHER, *(f"--{name}={text}" for name, text in BASE.items()), "--", "psa-jax", "build"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.endswith("PyYAML is not installed; pip install PyYAML\n")


def test_the_same_job_for_other_tools():
    done = launch("--print-equivalents", *ALL, command=[*WORDS, "--config.note=it's $HOME"])
    assert done.returncode == 0, done.stderr
    gcluster, xpk = (shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#"))
    command = shlex.join([*WORDS, "--config.note=it's $HOME", "--coordinator=auto"])
    assert gcluster == [
        *["gcluster", "job", "submit", "--name=sage", "--image=registry.example/psa-jax:1"],
        *["--compute-type=ct6e-standard-4t", "--topology=4x4", "--num-slices=2", "--queue=team"],
        *["--restart-on-exit-codes=75", "--restarts=50", "--grace-period=15s", "--gke-nap-provisioning=spot"],
        *["--mount=share:/mnt/share:rw", "--mount=data:/mnt/data:rw", "--service-account=trainer"],
        f"--command=exec {command}",
    ]
    assert xpk == [
        *["uvx", "xpk", "workload", "create", "--cluster=CLUSTER", "--project=PROJECT", "--zone=ZONE"],
        *["--workload=sage", "--docker-image=registry.example/psa-jax:1", "--tpu-type=v6e-4x4", "--num-slices=2"],
        *["--restart-on-exit-codes=75", "--max-restarts=50", "--termination-grace-period-seconds=15", "--spot"],
        *["--storage=share", "--storage=data", f"--command=exec {command}"],
    ]


def test_what_other_tools_do_not_take_is_said():
    done = launch("--print-equivalents", "--volume=a:/mnt", name="s" * 40, chip="v5e", topology="2x2")
    said = [line for line in done.stdout.splitlines() if line.startswith("#")]
    names = [line for line in said if line.startswith("# it takes names of at most")]
    assert [re.findall(r"\d+", line) for line in names] == [["28"], ["39"]]
    assert "# it has no v5litepod-2x2" in said and "uvx" not in done.stdout
