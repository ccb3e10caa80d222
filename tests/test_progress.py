"""What a command says while it works: lines in a file, a bar in a terminal, and no time left taken from compiling."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from psa_jax import progress
from psa_jax.progress import Progress, duration, print_on_main, print_stage, track

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Stands still unless it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def steps(clock: Clock, seconds: list[float], total: int | None = None, **options) -> None:
    with Progress(len(seconds) if total is None else total, "step", "training", clock=clock, **options) as bar:
        for each in seconds:
            clock.now += each
            bar.step()


def test_without_a_terminal_there_are_whole_lines_and_the_last_is_the_end(clock, capfd):
    steps(clock, [3.0] * 21)
    out, err = capfd.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err and err.endswith("\n")
    lines = err.splitlines()
    assert lines[0] == "training: 4/21 steps, 3.00 s/step, 0:51 left"
    assert len(lines) == 6 and lines[-1] == "training: 21/21 steps, 3.00 s/step, 1:03 in all"


def test_lines_are_some_seconds_apart_and_the_last_one_comes_at_once(clock, capfd):
    steps(clock, [0.001] * 5000)
    assert capfd.readouterr().err.splitlines() == ["training: 5000/5000 steps, 1,000 steps/s, 0:05 in all"]


def test_compiling_is_not_taken_for_the_pace(clock, capfd):
    """The first of 100 steps takes five minutes and the others two seconds: they take 3:18, not 8 hours."""
    steps(clock, [300.0, *[2.0] * 6], total=100)
    first, second = capfd.readouterr().err.splitlines()
    assert first == "training: 1/100 steps"  # nothing to go by yet
    assert second == "training: 6/100 steps, 2.00 s/step, 3:08 left"


def test_a_run_that_goes_on_counts_what_it_does_itself(clock, capfd):
    steps(clock, [60.0, 5.0, 5.0], total=1000, first=997)
    assert capfd.readouterr().err.splitlines() == [
        "training: 998/1000 steps",
        "training: 1000/1000 steps, 5.00 s/step, 1:10 in all",
    ]


def test_nothing_to_do_says_nothing(clock, capfd):
    steps(clock, [])
    steps(clock, [], total=5, first=5)
    assert list(track([], 0, "row", "reading")) == []
    assert capfd.readouterr() == ("", "")


def test_a_note_and_several_at_once(clock, capfd):
    with Progress(6, "row", "reference", clock=clock, every=0.0) as bar:
        bar.step(4, "loss 0.693")
        clock.now += 1.0
        bar.step(2)
    assert capfd.readouterr().err.splitlines() == [
        "reference: 4/6 rows, loss 0.693",
        "reference: 6/6 rows, 2.00 rows/s, 0:01 in all",
    ]


def test_tracked_items_are_all_counted(capfd):
    assert list(track("abc", 3, "letter", "reading")) == ["a", "b", "c"]
    assert "reading: 3/3 letters" in capfd.readouterr().err


def test_a_process_that_does_not_lead_is_silent(clock, capfd, monkeypatch):
    monkeypatch.setattr(progress, "_silenced", False)
    progress.silence()
    print_on_main("one line")
    print_stage("compiling", "a minute")
    steps(clock, [20.0] * 3)
    assert capfd.readouterr() == ("", "")


def test_a_stage_says_how_long_where_that_is_known(capfd):
    print_stage("compiling the step")
    print_stage("compiling the step", "about 20 s")
    assert capfd.readouterr() == ("", "psa-jax: compiling the step\npsa-jax: compiling the step (about 20 s)\n")


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "0:00"), (59.6, "1:00"), (754.0, "12:34"), (3723.0, "1:02:03")])
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize("columns", [0, 100])
def test_a_bar_in_a_terminal_of_any_size(columns):
    """Of size 0 (as under some job runners) it was blank."""
    code = (
        "from psa_jax.progress import Progress, print_stage\n"
        "print_stage('drawing pictures', 'half a minute')\n"
        "with Progress(3, 'picture', 'drawing') as bar:\n"
        "    for _ in range(3):\n"
        "        bar.step()\n"
    )
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=follower,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert (process.stdout.read(), process.wait(timeout=60)) == (b"", 0)
    process.stdout.close()
    text = shown.decode()
    assert text.startswith("psa-jax: drawing pictures (half a minute)\r\n")
    last = re.split(r"[\r\n]+", text.strip())[-1]
    assert re.match(r"100%\|.+\| drawing: 3/3 pictures", last), last
    assert len(last) <= (columns or 80)


def test_tqdm_is_imported_in_one_place():
    users = []
    for path in sorted((ROOT / "psa_jax").rglob("*.py")):
        if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.MULTILINE):
            users.append(path.name)
    assert users == ["progress.py"]
