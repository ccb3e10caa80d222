"""Configurations of the command line: `--config=NAME[:arg] --config.key=value` becomes a locked ConfigDict.

NAME is a shipped configuration, such as `tiny`, or the path of a Python file.
"""

import ast
import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from psa_jax.errors import PSAError
from psa_jax.renamed import KEYS, print_notice
from psa_jax.rules import quoted
from psa_jax.tools.arguments import CONFIGS

SWEEPS = CONFIGS / "sweeps"
"""Generators of overrides for every configuration."""


def load_config(argv: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """Reads the configuration that an argument list names and overrides.

    `--config=NAME[:arg]` calls `get_config([arg])` of a shipped configuration, `--config=FILE[:arg]` of a Python file;
    `--config.key.of.it=value` then sets a value, which is read as the type that it has in the file. The last of several
    equal options counts.

    Args:
      argv: arguments as typed; `--name=value` and `--name value` are the same.

    Returns:
      The locked configuration, and the other arguments in order.

    Raises:
      PSAError: there is no `--config`, the file cannot be used, a key is unknown or a value has another type.
    """
    source, overrides, rest = split_config(argv)
    return read_config(source, overrides), rest


def split_config(argv: Sequence[str]) -> tuple[str, list[tuple[str, str]], list[str]]:
    """What an argument list says of a configuration, as text, without reading the file.

    Args:
      argv: arguments as typed; `--name=value` and `--name value` are the same.

    Returns:
      The source (`NAME[:arg]` or `FILE[:arg]`), keys with their values, in order, and the other arguments.

    Raises:
      PSAError: there is no `--config`, or an option has no value.
    """
    source, overrides, rest = None, [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config" and not name.startswith("--config."):
            rest.append(word)
            continue
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise PSAError(f"{name}: no value; write {name}=VALUE")
        if name == "--config":
            source = value
        else:
            overrides.append((name.removeprefix("--config."), value))
    if source is None:
        raise PSAError(f"no configuration; give --config=NAME[:arg] ({', '.join(shipped())}) or --config=FILE[:arg]")
    return source, overrides, rest


def read_config(source: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Reads a configuration, overrides values in order, and locks it.

    Args:
      source: `NAME[:arg]` or `FILE[:arg]`.
      overrides: keys, such as `optimizer.name`, and their values as text.

    Raises:
      PSAError: the file cannot be used, a key is unknown or a value has another type.
    """
    file, colon, arg = source.partition(":")
    path = _find(file)
    get_config = getattr(_load_module(path), "get_config", None)
    if not callable(get_config):
        raise PSAError(f"{path}: has no get_config(); a config is a Python file with get_config(arg) -> ConfigDict")
    arguments = [arg] if colon else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError as error:
        advice = f"write {file} alone" if colon else f"write {file}:ARG"
        raise PSAError(f"{path}: get_config: {error}; {advice}") from error
    config = _call(path, "get_config", get_config, *arguments)
    if not isinstance(config, ConfigDict):
        raise PSAError(f"{path}: get_config() gave {type(config).__name__}; it must return a ConfigDict")
    _rename_old_keys(config)
    _call(path, "lock", config.lock)
    for key, text in overrides:
        if key in KEYS:
            print_notice(f"--config.{key}", f"--config.{KEYS[key]}")
        _override(config, KEYS.get(key, key), text, path)
    return config


def _rename_old_keys(config: ConfigDict) -> None:
    """Moves values that a file set under old names to the new names, where they replace the default."""
    for old, new in KEYS.items():
        group, _, old_name = old.rpartition(".")
        holder = config.get(group)
        if isinstance(holder, ConfigDict) and old_name in holder:
            print_notice(old, new)
            with holder.unlocked():
                holder[new.rpartition(".")[2]] = holder[old_name]
                del holder[old_name]


def shipped() -> dict[str, Path]:
    """Name -> file of the configurations that come with psa_jax, in a clone and in a wheel."""
    # Files without get_config hold what the others share.
    files = sorted(CONFIGS.glob("*.py"))
    return {path.stem: path for path in files if "\ndef get_config(" in path.read_text(encoding="utf-8")}


def read_sweep(source: str, name: str, config: ConfigDict) -> list[dict[str, Any]]:
    """What a generator of overrides yields: `sweep_NAME` of the configuration's own file, else of configs/sweeps.

    Args:
      source: of the configuration.
      name: of the generator after `sweep_`; empty for `sweep`.
      config: given to a generator that takes an argument.

    Returns:
      Key → value, such as {"objective.beta": 30.0}, once for each value of the sweep.

    Raises:
      PSAError: there is no such generator, it fails, or it yields something else.
    """
    own = _find(source.partition(":")[0])
    wanted, known = f"sweep_{name}" if name else "sweep", set()
    for path in (own, *sorted(SWEEPS.glob("*.py"))):
        module = _load_module(path)
        found = {word for word, each in vars(module).items() if re.match(r"sweep(_|$)", word) and callable(each)}
        known |= found
        if wanted in found:
            return _yielded(path, wanted, getattr(module, wanted), config)
    close = difflib.get_close_matches(wanted, known, n=1)
    names = ", ".join(sorted(word.removeprefix("sweep_") for word in known if word != "sweep"))
    hint = f"did you mean {close[0].removeprefix('sweep_')}? there are" if close and name else "give one of"
    raise PSAError(f"--sweep: neither {own} nor {SWEEPS} has {wanted}(); {hint} {names}")


def _yielded(path: Path, name: str, generator: Any, config: ConfigDict) -> list[dict[str, Any]]:
    arguments = [config] if inspect.signature(generator).parameters else []
    values = _call(path, name, lambda: list(generator(*arguments)))
    for each in values:
        if not isinstance(each, Mapping) or not each or not all(isinstance(key, str) for key in each):
            raise PSAError(f"{path}: {name} yields {quoted(each)}; yield {{key: value}}, such as {{'seed': 1}}")
    if not values:
        raise PSAError(f"{path}: {name} yields nothing; yield {{key: value}} for each value")
    return [dict(each) for each in values]


def _find(source: str) -> Path:
    """Finds the file of a name or a path."""
    path, named, here = Path(source), shipped().get(source), Path(f"{source}.py")
    if named is None:
        if not path.is_file():
            known = ", ".join(shipped())
            raise PSAError(f"{path}: no such config file; give the path of one, or a name that psa_jax knows ({known})")
        return path
    if here.is_file() and not here.samefile(named):
        raise PSAError(f"{source}: a configuration of psa_jax, and {here} is here, too; write {named} or ./{here}")
    return named


def _load_module(path: Path) -> ModuleType:
    # One package per folder, so that a configuration can write `from . import common`.
    package = f"psa_jax_configs_{hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:8]}"
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(path.parent.resolve())]
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise PSAError(f"{path}: is not a Python file; a config is a .py file with get_config()")
    module = importlib.util.module_from_spec(spec)
    _call(path, "import", spec.loader.exec_module, module)
    return module


def _call(path: Path, what: str, function: Any, *arguments: Any) -> Any:
    """Runs code of a configuration file; an exception becomes an error that names the file."""
    try:
        return function(*arguments)
    except PSAError:
        raise
    except SyntaxError as error:
        raise PSAError(f"{path}, line {error.lineno}: {error.msg}; correct the file") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PSAError(f"{path}: {what} failed ({reason}); --debug shows where") from error


def _override(config: ConfigDict, key: str, text: str, path: Path) -> None:
    option = f"--config.{key}"
    *groups, leaf = key.split(".")
    holder, known = config, ""
    for name in groups:
        if name not in holder:
            raise _unknown(config, key, f"{known}{name}", holder, path)
        holder, known = holder[name], f"{known}{name}."
        if not isinstance(holder, ConfigDict):
            raise PSAError(
                f"{option}: {known[:-1]} of {path} is a value, not a group; write --config.{known[:-1]}=VALUE"
            )
    if leaf not in holder:
        raise _unknown(config, key, key, holder, path)
    current = holder[leaf]
    if isinstance(current, ConfigDict):
        raise PSAError(f"{option}: is a group in {path}; set one of its keys: {', '.join(sorted(current))}")
    holder[leaf] = _parse(text, holder.get_type(leaf), current, option)


def _unknown(config: ConfigDict, key: str, absent: str, holder: ConfigDict, path: Path) -> PSAError:
    """The error for a key that is not there: it names the nearest ones, or else those of the group."""
    close = nearest_keys(key, config)
    meant = f"{', '.join(close[:-1])} or {close[-1]}" if close[1:] else "".join(close)
    advice = f"did you mean {meant}?" if close else f"keys there: {', '.join(sorted(holder))}"
    return PSAError(f"--config.{key}: {path} has no key {absent}; {advice}")


def nearest_keys(key: str, config: ConfigDict) -> list[str]:
    """Up to three keys of a configuration that a mistyped one may mean, the nearest first.

    A key is near if it is written alike as a whole, or if its last part is, in whatever group: beta, objective.beta.
    """
    scores = {}
    for known in _dotted(config):
        whole, end = (
            difflib.SequenceMatcher(None, *pair).ratio()
            for pair in ((key, known), (key.rpartition(".")[2], known.rpartition(".")[2]))
        )
        scores[known] = max(whole, 0.9 * end)
    best = max(scores.values(), default=0.0)
    near = [known for known, score in scores.items() if score >= max(0.7, best - 0.1)]
    return sorted(near, key=lambda known: (-scores[known], known))[:3]


def _dotted(config: ConfigDict, before: str = "") -> Iterator[str]:
    """Every key with its groups, groups included."""
    for name in config:
        yield before + name
        if isinstance(config.get(name), ConfigDict):
            yield from _dotted(config[name], f"{before}{name}.")


def _parse(text: str, kind: type, current: Any, option: str) -> Any:
    """Converts text to a value of `kind`. `none` means None for a key that is None in the file."""
    if current is None and text.lower() == "none":
        return None
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        if kind in (tuple, list):
            value = ast.literal_eval(text)
            return kind(value) if isinstance(value, (tuple, list)) else kind([value])
        if kind is type(None):
            return _literal(text)
    except (ValueError, SyntaxError, KeyError, RecursionError, MemoryError) as error:
        example = "or none" if current is None else f"such as {quoted(current)}"
        expected = "true or false" if kind is bool else f"a value of type {kind.__name__}, {example}"
        raise PSAError(f"{option}: {quoted(text)} does not fit; give {expected}") from error
    raise PSAError(f"{option}: a {kind.__name__} cannot be set from the command line; set it in the file")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deep
        return text
