"""Old public names and their new ones: commands, configuration keys, fields. Imports nothing heavy.

An old name works until `UNTIL` and prints one line on stderr. To rename something, add it to a table here; to drop old
names, empty the tables.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

UNTIL = "0.3.0"
"""First version without the old names."""

COMMANDS = {"fit": "memory"}
"""Commands: old -> new."""
KEYS = {"objective.anchor_weight": "objective.reference_kl_weight"}
"""Keys `group.name` of configurations, checkpoints and adapter metadata: old -> new, in the same group."""

Class = TypeVar("Class", bound=type)


@functools.cache
def print_notice(old: str, new: str) -> None:
    """Prints once per process that a name is old and what replaces it."""
    print(f"psa-jax: {old} is now called {new}; the old name works until psa_jax {UNTIL}", file=sys.stderr, flush=True)


def renamed_keys(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a configuration, or what was saved of one, with new names for its old keys. Prints nothing.

    Args:
      tree: groups by name, such as `{"objective": {"anchor_weight": 1.0}}`. Groups may be absent.

    Returns:
      The same values under the new names, in the same order.
    """
    renamed = dict(tree)
    for old, new in KEYS.items():
        group, _, old_name = old.rpartition(".")
        values = renamed.get(group)
        if isinstance(values, Mapping) and old_name in values:
            new_name = new.rpartition(".")[2]
            renamed[group] = {new_name if name == old_name else name: value for name, value in values.items()}
    return renamed


def accepts_old_fields(group: str) -> Callable[[Class], Class]:
    """Decorates a dataclass whose fields are the keys of a configuration group: takes their old names as keywords too.

    Args:
      group: name of the group in `KEYS`.
    """

    def decorate(cls: Class) -> Class:
        init = cls.__init__

        @functools.wraps(init)
        def renaming_init(self, *values: Any, **fields: Any) -> None:
            for old in [name for name in fields if f"{group}.{name}" in KEYS]:
                new = KEYS[f"{group}.{old}"]
                print_notice(f"{group}.{old}", new)
                fields[new.rpartition(".")[2]] = fields.pop(old)
            init(self, *values, **fields)

        cls.__init__ = renaming_init
        return cls

    return decorate
