"""The rehearsal of a pod: processes on CPUs encode, train, are killed and stopped, and go on in a smaller number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from psa_jax.interop.adapter_file import read_metadata

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "rehearsal.sh"
PSA_JAX = Path(sys.executable).with_name("psa-jax")


def rehearse(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def assert_rehearsed(done: subprocess.CompletedProcess, folder: Path, steps: int, hosts: int) -> dict:
    log = folder / "run.log"
    assert done.returncode == 0, done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    result = json.loads(done.stdout.splitlines()[-1])
    assert [json.loads(row)["step"] for row in (folder / "run" / "metrics.jsonl").read_text().splitlines()] == list(
        range(1, steps + 1)
    )
    for said in ("one host was killed after step", "SIGTERM to all: exit code 75", f"{hosts // 2} hosts went on"):
        assert said in done.stderr
    assert read_metadata(folder / "adapter.safetensors")["steps"] == steps
    assert len(list((folder / "pictures").glob("*.png"))) == 1 and (folder / "run" / "curves.html").is_file()
    return result


def assert_swept(folder: Path, points: int) -> None:
    rows = (folder / "sweep" / "sweep.csv").read_text().splitlines()
    assert len(rows) == 1 + points and all(",done," in row for row in rows[1:])


@pytest.mark.timeout(900)
def test_two_hosts_in_little(smallest_pipeline, tmp_path):
    folder = tmp_path / "pod"
    words = [
        "--hosts=2",
        "--steps=240",
        "--config=tiny:dpo-smoke",
        f"--model={smallest_pipeline[1].folder}",
        "--users=32",
        "--rates=3e-3",
    ]
    done = rehearse(*words, f"--psa-jax={PSA_JAX}", str(folder))
    assert_rehearsed(done, folder, 240, 2)
    assert "a sweep of 2 points" in done.stderr
    assert_swept(folder, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_hosts(tmp_path):
    result = assert_rehearsed(rehearse(f"--psa-jax={PSA_JAX}", str(tmp_path / "pod")), tmp_path / "pod", 24, 4)
    assert_swept(tmp_path / "pod", 8)
    print(f"\n{json.dumps(result)}")
    assert result["seconds"] <= 900


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no folder; give a new one"),
        (["--hosts=3", "x"], "--hosts=3: give an even number"),
        (["--steps=2", "x"], "--steps=2: give 12 or more"),
        (["--rates=fast", "x"], "--rates=fast: give numbers such as"),
        (["--slices=2", "x"], "unknown option --slices=2"),
        (["--psa-jax=psa-jax-that-is-not-there", "x"], "not found; install psa_jax"),
        (["."], "is there already; give a new folder"),
    ],
)
def test_wrong_words(words, said):
    done = rehearse(*words)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
