"""Sources in buckets, copied to this machine before a command runs. Imports nothing heavy unless there are some."""

import argparse
from pathlib import Path
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.paths import Address, Source, address_or_none
from psa_jax.tools.arguments import BASE_MODEL

KEYS = (*(name for name in BASE_MODEL if name != "variant"), "init_from", "data.shards", "data.table")
"""Keys of a configuration that name what is only read."""


def bring_sources(args: argparse.Namespace) -> None:
    """Replaces every source in a bucket, among the flags and in the configuration, by its copy on this machine.

    Raises:
      PSAError: one cannot be copied.
    """
    copies: dict[str, Path] = {}
    for name, value in vars(args).items():
        if isinstance(value, Source):
            setattr(args, name, _copy(value, copies))
        elif isinstance(value, list) and any(isinstance(each, Source) for each in value):
            setattr(args, name, [_copy(each, copies) if isinstance(each, Source) else each for each in value])
        elif name in BASE_MODEL and isinstance(value, str) and (address := address_or_none(value)):
            setattr(args, name, str(_copy(address, copies)))
    if getattr(args, "takes_config", False) and args.config is not None:
        _bring_keys(args.config, copies)


def _bring_keys(config: Any, copies: dict[str, Path]) -> None:
    for key in KEYS:
        group, _, name = key.rpartition(".")
        holder = config.get(group) if group else config
        value = holder.get(name) if holder is not None else None
        try:
            if isinstance(value, str) and (address := address_or_none(value)):
                with config.unlocked():
                    holder[name] = str(_copy(address, copies))
        except PSAError as error:
            raise PSAError(f"{key}: {error}") from error


def _copy(address: Address, copies: dict[str, Path]) -> Path:
    if str(address) not in copies:
        from psa_jax.remote import fetch  # imported late: only who has a bucket needs it

        copies[str(address)] = fetch(address)
    return copies[str(address)]
