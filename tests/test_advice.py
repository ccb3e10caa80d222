"""Advice that names a flag, a command or a key of the configuration names one that is there.

Every text of the package is read from its source, as errors are put together in many ways; docstrings are left out.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from psa_jax import cli
from psa_jax.tools.configs import read_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "psa_jax"
FLAGS = {name: set(cli._command_parser(name)._option_string_actions) for name in cli.COMMANDS}
SAID_BY = {
    "bench_generate": ["bench"],
    "bench_step": ["bench"],
    "bench_torch": ["bench"],
    "turns": ["bench"],
    "prompts": ["generate"],
    "evaluate_erase": ["evaluate erase"],
    "evaluate_limits": ["evaluate limits"],
    "evaluate_prompts": ["evaluate prompts"],
    "evaluate_verdicts": ["evaluate verdicts"],
    "import_": ["import"],
    "sweep_report": ["sweep report"],
}
"""File in tools/ -> the commands that it is of, where it is not named as its command."""
NO_ADVICE = {"--bits", "--version", "--no-deps"}  # of psa-jax itself, and of pip
NO_ADVICE |= {"--apply", "--job-name", "--name", "--yes"}  # of schedulers, which `sweep` calls

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*(?:\.[\w.{}]+)?")
COMMAND = re.compile(r"psa-jax ([a-z]+)([^;()]*)")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string, with {} for what is put into it; no docstring."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            skipped |= {id(each.value) for each in body if isinstance(each, ast.Expr)}  # of attributes, too
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in ast.walk(node) if isinstance(part, ast.Constant)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def keys(config, before: str = "") -> Iterator[str]:
    """Every key with its groups: optimizer, optimizer.name, …"""
    for name, value in config.items():
        yield before + name
        if hasattr(value, "items"):
            yield from keys(value, f"{before}{name}.")


KEYS = set(keys(read_config(str(ROOT / "configs" / "tiny.py"))))
GROUPS = {key for key in KEYS if any(other.startswith(f"{key}.") for other in KEYS)}
TEXTS = [
    (path.relative_to(PACKAGE).as_posix(), line, text)
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name
    not in ("arguments.py", "evaluate_arguments.py", "sweep_arguments.py", "renamed.py")  # flags; names that are gone
    for line, text in texts(path)
]


def flags_in(text: str) -> list[str]:
    return [flag for flag in FLAG.findall(text) if flag not in NO_ADVICE and not flag.startswith("--config.")]


def wrong(file: str, text: str) -> list[str]:
    """What a text names and nobody has."""
    found = []
    for command, rest in COMMAND.findall(text):
        if command not in FLAGS and f"psa-jax {command}" in text:
            found.append(f"psa-jax {command}")
        found += [f"{command} {flag}" for flag in flags_in(rest) if flag not in FLAGS.get(command, ())]
    # A file of one command gives the flags of that command.
    folder, _, name = file.rpartition("/")
    commands = SAID_BY.get(Path(name).stem, [Path(name).stem]) if folder == "tools" else []
    known = set().union(*(FLAGS.get(command, set()) for command in commands or FLAGS)) or set().union(*FLAGS.values())
    found += [flag for flag in flags_in(COMMAND.sub("", text)) if flag not in known]
    for flag in FLAG.findall(text):
        key = flag.removeprefix("--config.").rstrip(".")
        if flag.startswith("--config.") and "{" not in key and key not in KEYS | {"key", "KEY"}:
            found.append(flag)
    for group, name in re.findall(r"(?<![\w./-])([a-z_]+)\.([a-z_]\w*)(?![\w(/.])", text):
        if group in GROUPS and f"{group}.{name}" not in KEYS:
            found.append(f"{group}.{name}")
    return found


def test_every_flag_command_and_key_that_is_named_exists():
    assert [(file, line, each) for file, line, text in TEXTS for each in wrong(file, text)] == []
    assert sum(bool(FLAG.search(text)) for _, _, text in TEXTS) > 40  # they are found


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tools/demo.py", "they have not joined; give --coordinator=auto"),
        ("profiles/table.py", "encode it with psa-jax encode USERS --append"),
        ("profiles/table.py", "add it with psa-jax embed USERS"),
        ("training/loop.py", "raise validate.row"),
        ("training/loop.py", "give --config.data.shard=PATH"),
        ("interop/weights.py", "give --varient"),
    ],
)
def test_what_does_not_exist_is_found(file, text):
    assert len(wrong(file, text)) == 1
