"""Progress of a command on stderr: what it does and how long it still takes. Results go to stdout.

A terminal gets a bar; a log file or a pipe gets a line every few seconds. In a group of processes only the main one
prints: the others call `silence`.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

EVERY = 10.0
"""Seconds between two lines when stderr is no terminal."""
_REDRAW = 0.2  # seconds between two updates of a bar
_COLUMNS, _ROWS = 80, 24  # for a terminal that does not report its size

_silenced = False


def silence() -> None:
    """Stops all output of this process: another process of the group prints."""
    global _silenced
    _silenced = True


def print_on_main(text: str) -> None:
    """Prints one line on stderr, above the bar if there is one; prints nothing after `silence`."""
    if not _silenced:
        tqdm.write(f"psa-jax: {text}", file=sys.stderr)
        sys.stderr.flush()


def print_stage(what: str, about: str = "") -> None:
    """Prints one line before work that takes a while.

    Args:
      what: the work.
      about: its duration or size, if known; shown in parentheses.
    """
    print_on_main(f"{what} ({about})" if about else what)


class Progress:
    """Counter of finished steps that shows speed and remaining time.

    The first step compiles. Its time does not count in the speed, and no remaining time is shown before the second.

    Args:
      total: number of steps; if none are left, nothing is shown.
      unit: name of a step in the singular, such as "picture".
      desc: name of the work.
      first: steps finished earlier.
      every: seconds between two lines when stderr is no terminal. The last line, total/total, is always shown.
      clock: returns seconds since any fixed time.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        desc: str,
        *,
        first: int = 0,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._unit, self._desc, self._done = total, unit, desc, first
        self._every, self._clock = every, clock
        self._start = self._last_line = clock()
        self._warm: tuple[int, float] | None = None
        self._silent = _silenced or first >= total
        self._bar = None
        if not self._silent and sys.stderr.isatty():
            width = _columns()
            self._bar = tqdm(
                total=total,
                initial=first,
                desc=self._words(self._start, ""),
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
                file=sys.stderr,
                mininterval=_REDRAW,
                miniters=1,
                ncols=None if width else _COLUMNS,
                nrows=None if width else _ROWS,
                dynamic_ncols=width > 0,
            )

    def step(self, count: int = 1, note: str = "") -> None:
        """Counts finished steps and updates the display.

        Args:
          count: steps finished since the last call.
          note: text after the numbers.
        """
        now = self._clock()
        self._done += count
        if not self._silent:
            self._show(count, now, note)
        if self._warm is None:
            self._warm = self._done, now

    def _show(self, count: int, now: float, note: str) -> None:
        words = self._words(now, note)
        if self._bar is not None:
            self._bar.set_description_str(words, refresh=False)
            self._bar.update(count)
        elif self._done >= self._total or now - self._last_line >= self._every:
            print(words, file=sys.stderr, flush=True)
            self._last_line = now

    def _words(self, now: float, note: str) -> str:
        parts = [f"{self._desc}: {self._done}/{self._total} {self._unit}s"]
        if self._warm is not None and now > self._warm[1]:
            pace = (self._done - self._warm[0]) / (now - self._warm[1])
            digits = "#.3g" if pace < 100 else ",.0f"
            parts.append(f"{pace:{digits}} {self._unit}s/s" if pace >= 1 else f"{1 / pace:#.3g} s/{self._unit}")
            if self._done < self._total:
                parts.append(f"{duration((self._total - self._done) / pace)} left")
        if self._done >= self._total:
            parts.append(f"{duration(now - self._start)} in all")
        return ", ".join([*parts, note] if note else parts)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def track(items: Iterable[Item], total: int, unit: str, desc: str) -> Iterator[Item]:
    """Yields the items and shows progress. An item counts as finished when the next one is requested."""
    with Progress(total, unit, desc) as progress:
        for item in items:
            yield item
            progress.step()


def duration(seconds: float) -> str:
    """Formats seconds as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 0
