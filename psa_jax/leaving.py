"""How a process that fails leaves a group of processes. Imports nothing heavy.

Processes that train together wait for each other when Python exits. A command that joins such a group registers a
function here; `psa_jax.cli` calls it with the exit code after it has printed the error.
"""

from collections.abc import Callable

LeaveGroup = Callable[[int, BaseException | None, bool], None]
"""Takes what `leave_group` takes; ends this process if it belongs to a group, and returns otherwise."""

_registered: list[LeaveGroup] = []


def on_failure(leave: LeaveGroup) -> None:
    """Registers what ends this process when its command fails; registering it again changes nothing."""
    if leave not in _registered:
        _registered.append(leave)


def leave_group(code: int, error: BaseException | None = None, refused: bool = False) -> None:
    """Calls every registered function; returns if this process belongs to no group.

    Args:
      code: exit code of the process.
      error: shown with its traceback, if given.
      refused: whether the other processes will refuse the same setting.
    """
    for leave in _registered:
        leave(code, error, refused)
