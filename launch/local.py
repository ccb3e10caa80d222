#!/usr/bin/env python3
"""Runs N processes of one command on this machine, joined by jax.distributed, and restarts all when one fails.

    python launch/local.py --processes 2 -- psa-jax train --config=configs/tiny.py --config.mesh.data=2 --workdir=runs/a

Every process gets `--coordinator --num-processes --process-id`. When one fails, all are ended and started again, and
continue from the last checkpoint. There is no restart after exit codes 1 and 2, which another start would repeat.
SIGTERM and SIGINT are sent to all processes, which save a checkpoint and exit with 75. The exit code is that of the
processes.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import IO

DONE, ERRORS = 0, (1, 2)
GRACE = 10.0  # seconds for the others to fail: the first process to end may not be the cause


def command_of(words: list[str], port: int, processes: int, index: int) -> list[str]:
    """Adds the flags of one process to the command."""
    flags = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={index}"]
    return [*words, *flags]


def free_port() -> int:
    """Finds a port that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def outcome(codes: list[int]) -> int:
    """Reduces the exit codes of a group to one: 1 or 2 if there is one, else any failure, else 0."""
    failures = [code for code in codes if code != DONE]
    errors = [code for code in failures if code in ERRORS]
    code = (errors or failures or [DONE])[0]
    return code if code >= 0 else 128 - code  # killed by a signal: as in a shell


class Group:
    """The processes of one attempt."""

    def __init__(self, commands: list[list[str]]):
        self._processes = []
        self._readers = []
        for index, command in enumerate(commands):
            # A session of its own: Ctrl-C must reach it only through this process.
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
            )
            self._processes.append(process)
            for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=_forward, args=(index, source, target), daemon=True)
                reader.start()
                self._readers.append(reader)

    def signal(self, number: int) -> None:
        """Sends a signal to the processes that still run."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def wait(self) -> list[int]:
        """Waits for all processes, and kills those that run on GRACE seconds after a failure.

        Returns:
          Their exit codes.
        """
        failed = None
        while any(process.poll() is None for process in self._processes):
            if failed is None and any(process.poll() not in (None, DONE) for process in self._processes):
                failed = time.monotonic()
            if failed is not None and time.monotonic() - failed > GRACE:
                self.signal(signal.SIGKILL)
            time.sleep(0.05)
        for reader in self._readers:
            reader.join(timeout=GRACE)
        return [process.returncode for process in self._processes]


def _forward(index: int, source: IO[str], target: IO[str]) -> None:
    # Universal newlines: a progress bar's carriage returns become lines.
    for line in source:
        target.write(f"[{index}] {line}")
        target.flush()


def run(words: list[str], processes: int, restarts: int) -> int:
    """Runs the group and restarts it after failures.

    Args:
      words: the command.
      processes: their number.
      restarts: most restarts.

    Returns:
      The exit code of the last attempt.
    """
    received: list[int] = []  # signals
    group: Group | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if group is not None:
            group.signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(restarts + 1):
            port = free_port()
            group = Group([command_of(words, port, processes, index) for index in range(processes)])
            if received:  # between two attempts
                group.signal(signal.SIGTERM)
            code = outcome(codes := group.wait())
            if code == DONE or code in ERRORS or received or attempt == restarts:
                return code
            print(f"launch: exit codes {codes}; restart {attempt + 1} of {restarts}", file=sys.stderr, flush=True)
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Reads the flags, runs the group and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="number of processes")
    parser.add_argument("--restarts", type=int, default=3, metavar="R", help="most restarts (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="only print the command lines")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, such as: psa-jax train --config=…")
    args = parser.parse_args(argv)
    if args.processes < 1 or args.restarts < 0:
        parser.error("--processes must be at least 1 and --restarts at least 0")
    if shutil.which(args.command[0]) is None and not args.dry_run:
        parser.error(f"{args.command[0]}: no such command; give its path, such as .venv/bin/psa-jax")
    if args.dry_run:
        port = free_port()
        for index in range(args.processes):
            print(shlex.join(command_of(args.command, port, args.processes, index)))
        return DONE
    return run(args.command, args.processes, args.restarts)


if __name__ == "__main__":
    sys.exit(main())
