"""What a command is doing and how long it still takes, on stderr: stdout is for results.

In a terminal a bar, elsewhere (a log file, a pipe) whole lines, some seconds apart. Of several processes that work
together one speaks: `hush` silences the others.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

EVERY = 10.0
"""Seconds between two lines where there is no terminal."""
_REDRAW = 0.2  # seconds between two looks of a bar
_COLUMNS, _ROWS = 80, 24  # of a terminal that does not know its size

_hushed = False


def hush() -> None:
    """From here on this process says nothing: another one does."""
    global _hushed
    _hushed = True


def say(text: str) -> None:
    """One line, above a bar where there is one."""
    if not _hushed:
        tqdm.write(f"psa-jax: {text}", file=sys.stderr)
        sys.stderr.flush()


def stage(what: str, about: str = "") -> None:
    """One line before something that takes a while.

    Args:
      about: how long, where that is known: measured on the machine that it names, or counted.
    """
    say(f"{what} ({about})" if about else what)


class Progress:
    """How many of `total` steps are done, how fast they go and how long the rest takes.

    The first step compiles: its time is not counted in the pace, and no time left is said before the second one.

    Args:
      total: steps in all; where none is to be done, nothing is said.
      unit: what a step is, in the singular, such as "picture".
      desc: what is being done.
      first: steps that were done before.
      every: seconds between two lines where there is no terminal. The last line, total/total, always comes.
      clock: seconds from any start.
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
        self._start = self._said = clock()
        self._warm: tuple[int, float] | None = None
        self._silent = _hushed or first >= total
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
        """So many more are done.

        Args:
          note: what else is worth saying.
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
        elif self._done >= self._total or now - self._said >= self._every:
            print(words, file=sys.stderr, flush=True)
            self._said = now

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
    """The items, each counted when the next one is asked for: they must be read to their end."""
    with Progress(total, unit, desc) as progress:
        for item in items:
            yield item
            progress.step()


def duration(seconds: float) -> str:
    """Such as 0:42 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 0
