#!/usr/bin/env python3
"""Renders a JobSet that runs one psa-jax command on TPU slices of a GKE cluster, and hands it to kubectl if asked.

    python launch/gke.py --name=sage --chip=v6e --topology=4x4 --image=REGISTRY/psa-jax:1 --queue=team \\
        --volume=share:/mnt/share -- psa-jax train --config=sd15 --workdir=/mnt/share/run

Without --apply it only prints. Exit code 75 (stopped, with a checkpoint) and a pod that is moved start all pods again
without being counted; every other failure counts against --restarts. The folders of a run are on volumes that all pods
mount.
"""

import argparse
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import PurePosixPath

STOPPED = 75  # psa_jax.errors.STOPPED, which a machine that only submits need not have
CHIPS_A_HOST = 4  # of the machine types below
SPOT_GRACE, GRACE = 15, 60  # seconds from SIGTERM to SIGKILL; a Spot node gets no more unless its pool is made for it
GCLUSTER_NAME, XPK_NAME = 28, 39  # most characters of a job's name
COUNTED = 50  # restarts for the tools that count exit code 75, too
CONTAINER = JOB = "psa-jax"
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
NAMES = {  # of Kubernetes: a queue and a claim may have dots
    "RFC 1035": re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?"),
    "RFC 1123": re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*"),
}


class Refused(ValueError):
    """A setting that no cluster would take: one line for the user."""


@dataclass(frozen=True)
class Chip:
    """A generation of TPUs, as GKE calls it.

    Attributes:
      accelerator: value of the node label cloud.google.com/gke-tpu-accelerator.
      machine: machine type of the nodes.
      topologies: those of its slices.
      xpk: what xpk's --tpu-type begins with.
      not_in_xpk: topologies that it does not have.
    """

    accelerator: str
    machine: str
    topologies: tuple[str, ...]
    xpk: str
    not_in_xpk: tuple[str, ...] = ()


CHIPS = {
    "v5e": Chip("tpu-v5-lite-podslice", "ct5lp-hightpu-4t", FLAT, "v5litepod", ("2x2",)),
    "v5p": Chip("tpu-v5p-slice", "ct5p-hightpu-4t", DEEP, "v5p"),
    "v6e": Chip("tpu-v6e-slice", "ct6e-standard-4t", FLAT, "v6e"),
}


@dataclass(frozen=True)
class Job:
    """What the flags say; checked.

    Attributes:
      name: of the JobSet.
      namespace: of the JobSet; empty: the one kubectl is set to.
      chip: the generation.
      topology: chips of a slice along each axis.
      slices: their number.
      spot: whether on Spot nodes.
      image: of the container.
      queue: the Kueue LocalQueue.
      volumes: (claim, path) of what is mounted.
      service_account: of the pods; empty: the namespace's.
      grace: seconds from SIGTERM to SIGKILL.
      restarts: most restarts after failures.
      command: psa-jax and its words.
    """

    name: str
    namespace: str
    chip: Chip
    topology: str
    slices: int
    spot: bool
    image: str
    queue: str
    volumes: tuple[tuple[str, str], ...]
    service_account: str
    grace: int
    restarts: int
    command: tuple[str, ...]

    @property
    def hosts(self) -> int:
        """Hosts, and so pods, of a slice."""
        return math.prod(map(int, self.topology.split("x"))) // CHIPS_A_HOST


def check_name(flag: str, text: str, kind: str = "RFC 1123", most: int = 63) -> None:
    """Raises Refused on a name that Kubernetes would refuse."""
    if not NAMES[kind].fullmatch(text):
        start = "begin with a letter" if kind == "RFC 1035" else "begin with a letter or digit"
        raise Refused(f"{flag}={text}: Kubernetes takes small letters, digits and -; {start}, end with one ({kind})")
    if len(text) > most:
        raise Refused(f"{flag}={text} has {len(text)} characters; at most {most} are taken")


def check_command(words: list[str]) -> list[str]:
    """The command for the pods; `train` is told to find the other processes.

    Raises:
      Refused: it is not psa-jax with a command.
    """
    if len(words) < 2 or PurePosixPath(words[0]).name != "psa-jax" or words[1].startswith("-"):
        raise Refused(f"{shlex.join(words) or 'nothing'}: give psa-jax and its command after --: -- psa-jax train …")
    try:
        "".join(words).encode()
    except UnicodeEncodeError as error:
        raise Refused("the command is not UTF-8, and YAML cannot hold it") from error
    alone = not any(word.partition("=")[0] == "--coordinator" for word in words)
    return [*words, "--coordinator=auto"] if words[1] == "train" and alone else words


def check_workdir(words: list[str], volumes: tuple[tuple[str, str], ...]) -> None:
    """Raises Refused where a run would be written into a pod, and be gone with it."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    given = [word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == "--workdir"]
    for folder in given:
        if words[1] == "train" and folder.startswith(("gs://", "s3://")):  # the run copies what it leaves
            continue
        if not any(PurePosixPath(folder).is_relative_to(path) for _, path in volumes) or ".." in folder.split("/"):
            raise Refused(
                f"--workdir={folder} is on no volume and would be gone with its pod; mount one there: --volume, "
                "or train in a bucket: --workdir=gs://BUCKET/RUN"
            )


def volume_of(text: str) -> tuple[str, str]:
    """Reads CLAIM:PATH."""
    claim, _, path = text.partition(":")
    check_name("--volume", claim, most=253)
    if not re.fullmatch(r"(/[^/:,\s]+)+", path) or ".." in path.split("/"):
        raise Refused(f"--volume={text}: give CLAIM:PATH, such as share:/mnt/share")
    return claim, path


def job_of(args: argparse.Namespace) -> Job:
    """Checks the flags.

    Raises:
      Refused: a value that cannot be; the text says which.
    """
    chip, topologies = CHIPS[args.chip], CHIPS[args.chip].topologies
    if args.topology not in topologies:
        raise Refused(f"--topology={args.topology}: {args.chip} has no such slice, but {', '.join(topologies)}")
    if args.slices < 1 or args.restarts < 0 or (args.grace is not None and args.grace < 1):
        raise Refused("--slices and --grace must be at least 1 and --restarts at least 0")
    if not re.fullmatch(r"[a-z0-9][\w.:/@-]*", args.image):
        raise Refused(f"--image={args.image}: give the name of an image, such as REGISTRY/psa-jax:1")
    check_name("--name", args.name, "RFC 1035")
    check_name("--queue", args.queue)
    for flag, text in (("--namespace", args.namespace), ("--service-account", args.service_account)):
        if text:
            check_name(flag, text)
    volumes = tuple(map(volume_of, args.volume))
    if len({path for _, path in volumes}) < len(volumes):
        raise Refused("--volume: two are mounted at one path")
    words = check_command(args.command)
    check_workdir(words, volumes)
    grace = args.grace or (SPOT_GRACE if args.spot else GRACE)
    job = Job(
        args.name,
        args.namespace,
        chip,
        args.topology,
        args.slices,
        args.spot,
        args.image,
        args.queue,
        volumes,
        args.service_account,
        grace,
        args.restarts,
        tuple(words),
    )
    # JobSet names a pod NAME-JOB-SLICE-HOST-abcde, and that must be a host name.
    rest = len(f"-{JOB}-{job.slices - 1}-{job.hosts - 1}-abcde")
    check_name("--name", args.name, "RFC 1035", 63 - rest)
    return job


def jobset(job: Job) -> dict:
    """The JobSet of a job; of v1alpha2 it has fields that JobSet 0.10.1 knows."""
    metadata = {"name": job.name} | ({"namespace": job.namespace} if job.namespace else {})
    labels = {"kueue.x-k8s.io/queue-name": job.queue}
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    stopped = {
        "name": "stopped",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    slices = {
        "parallelism": job.hosts,
        "completions": job.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a pod alone cannot come back to a group
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [STOPPED]},
                },
            ]
        },
        "template": {"spec": pod(job)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {**metadata, "labels": labels, "annotations": annotations},
        "spec": {
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [stopped]},
            "replicatedJobs": [{"name": JOB, "replicas": job.slices, "template": {"spec": slices}}],
        },
    }


def pod(job: Job) -> dict:
    """The pod of a host."""
    claims = list(dict.fromkeys(claim for claim, _ in job.volumes))  # one may be mounted at two paths
    shared = [{"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}} for i, claim in enumerate(claims)]
    mounts = [{"name": f"claim-{claims.index(claim)}", "mountPath": path} for claim, path in job.volumes]
    container = {
        "name": CONTAINER,
        "image": job.image,
        "securityContext": {"runAsUser": 0},  # the device files of a TPU are root's
        # Not through a shell, which would keep SIGTERM. Kubernetes replaces $(NAME); $$ is a dollar.
        "command": [word.replace("$", "$$") for word in job.command],
        # With both named, a TPU that does not start is an error and not a run on the CPU.
        "env": [{"name": "JAX_PLATFORMS", "value": "tpu,cpu"}],
        "resources": {
            "requests": {"google.com/tpu": CHIPS_A_HOST},
            "limits": {"google.com/tpu": CHIPS_A_HOST},
        },
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *mounts],
    }
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.chip.accelerator,
        "cloud.google.com/gke-tpu-topology": job.topology,
        "node.kubernetes.io/instance-type": job.chip.machine,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        tolerations.append(spot)
    between = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}  # slices talk over the nodes' network
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        **(between if job.slices > 1 else {}),
        **({"serviceAccountName": job.service_account} if job.service_account else {}),
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}, *shared],
    }


def rendered(job: Job) -> str:
    """The JobSet as YAML.

    Raises:
      Refused: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise Refused("PyYAML is not installed; pip install PyYAML") from error
    return yaml.safe_dump(jobset(job), sort_keys=False, allow_unicode=True, width=120)


def equivalents(job: Job) -> str:
    """Lines of shell that start the same job with gcluster and xpk.

    Both end a run at exit code 75 unless told otherwise, and then count it as a restart. Both run the command in a
    shell, which exec replaces by psa-jax, so that psa-jax gets the signal.
    """
    command = f"--command=exec {shlex.join(job.command)}"
    gcluster = ["gcluster", "job", "submit", f"--name={job.name}", f"--image={job.image}"]
    gcluster += [f"--compute-type={job.chip.machine}", f"--topology={job.topology}", f"--num-slices={job.slices}"]
    gcluster += [f"--queue={job.queue}", f"--restart-on-exit-codes={STOPPED}", f"--restarts={COUNTED}"]
    gcluster += [f"--grace-period={job.grace}s", *(["--gke-nap-provisioning=spot"] if job.spot else [])]
    gcluster += [f"--mount={claim}:{path}:rw" for claim, path in job.volumes]
    gcluster += [f"--service-account={job.service_account}"] if job.service_account else []
    lines = ["# gcluster; with --dry-run-out=FILE it only writes the JobSet"]
    if len(job.name) > GCLUSTER_NAME:
        lines.append(f"# it takes names of at most {GCLUSTER_NAME} characters: give a shorter one")
    lines.append(shlex.join([*gcluster, command]))
    lines += ["# xpk, in its own queue; with --dry-run --output-manifest-file=FILE it only writes the JobSet"]
    if len(job.name) > XPK_NAME:
        lines.append(f"# it takes names of at most {XPK_NAME} characters: give a shorter one")
    if job.topology in job.chip.not_in_xpk:
        return "\n".join([*lines, f"# it has no {job.chip.xpk}-{job.topology}"])
    xpk = ["uvx", "xpk", "workload", "create", "--cluster=CLUSTER", "--project=PROJECT", "--zone=ZONE"]
    xpk += [f"--workload={job.name}", f"--docker-image={job.image}", f"--tpu-type={job.chip.xpk}-{job.topology}"]
    xpk += [f"--num-slices={job.slices}", f"--restart-on-exit-codes={STOPPED}", f"--max-restarts={COUNTED}"]
    xpk += [f"--termination-grace-period-seconds={job.grace}", *(["--spot"] if job.spot else [])]
    if job.volumes:
        lines.append("# --storage names what xpk storage attach has attached, and where it is mounted")
        xpk += [f"--storage={claim}" for claim in dict.fromkeys(claim for claim, _ in job.volumes)]
    return "\n".join([*lines, shlex.join([*xpk, command])])


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("--name", required=True, help="name of the JobSet")
    flags.add_argument("--namespace", default="", help="its namespace (default: that of kubectl)")
    flags.add_argument("--chip", required=True, choices=CHIPS, help="generation of the TPU")
    flags.add_argument("--topology", required=True, metavar="AxB", help="chips of a slice, such as 4x4 or 2x2x4")
    flags.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices (default: %(default)s)")
    flags.add_argument("--spot", action="store_true", help="on Spot nodes, which may be taken away after 15 s")
    flags.add_argument("--image", required=True, help="the container's image, made with launch/Dockerfile")
    flags.add_argument("--queue", required=True, help="Kueue's LocalQueue")
    flags.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM:PATH",
        help="mounts a PersistentVolumeClaim that every pod can write to; may be repeated",
    )
    flags.add_argument("--service-account", default="", metavar="NAME", help="Kubernetes service account of the pods")
    flags.add_argument(
        "--grace",
        type=int,
        metavar="S",
        help=f"seconds from SIGTERM to SIGKILL (default: {GRACE}; {SPOT_GRACE} on Spot nodes, where more helps only if "
        "the node pool is made for it)",
    )
    flags.add_argument(
        "--restarts", type=int, default=3, metavar="R", help="most restarts after failures (default: %(default)s)"
    )
    how = flags.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the JobSet, which is the default")
    how.add_argument("--apply", action="store_true", help="hand the JobSet to kubectl apply")
    how.add_argument(
        "--print-equivalents", action="store_true", help="print the command lines of gcluster and xpk for the same job"
    )
    flags.add_argument("command", nargs="+", metavar="COMMAND", help="after --: psa-jax train --config=…")
    return flags


def main(argv: list[str] | None = None) -> int:
    """Reads the flags, prints or applies, and returns the exit code."""
    flags = parser()
    args = flags.parse_args(argv)
    try:
        job = job_of(args)
        if args.apply and shutil.which("kubectl") is None:
            raise Refused("kubectl not found; install it and point it at the cluster, or leave out --apply")
        if args.print_equivalents:
            print(equivalents(job))
            return 0
        text = rendered(job)
    except Refused as error:
        flags.error(str(error))
    if not args.apply:
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main())
