"""`psa-jax build` on the full-size stand-in with the embedded VAE: time, memory, and five kills at random moments."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.standin import write_standin

KILLS = 5


def start(sage: Path, out: Path) -> subprocess.Popen:
    words = ["build", str(sage), "--model=tiny", f"--out={out}", "--resolution=32", "--batch-size=64"]
    return subprocess.Popen(
        [sys.executable, "-m", "psa_jax", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish(child: subprocess.Popen) -> tuple[int, float]:
    """Exit status and peak memory in GiB of that very child."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)  # or Popen would take it for running
    return child.returncode, usage.ru_maxrss / 2**20


def content(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_builds_end_in_the_same_bytes(tmp_path: Path):
    assert sum(write_standin(tmp_path / "sage").values()) == 44_100
    began = time.perf_counter()
    code, peak = finish(start(tmp_path / "sage", tmp_path / "whole"))
    seconds = time.perf_counter() - began
    assert code == 0
    print(f"\n44,100 rows built at 32 px: {seconds:.0f} s, peak memory {peak:.2f} GiB")

    rng, killed = random.Random(0), 0
    for _ in range(KILLS):
        child = start(tmp_path / "sage", tmp_path / "killed")
        time.sleep(rng.uniform(0.1, 0.9) * seconds / 2)
        child.send_signal(signal.SIGKILL)
        killed += finish(child)[0] == -signal.SIGKILL
    code, _ = finish(start(tmp_path / "sage", tmp_path / "killed"))
    print(f"{killed} of {KILLS} builds were killed before their end")
    assert code == 0 and killed >= 3
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert not (tmp_path / "killed.parts").exists()
