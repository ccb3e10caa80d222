"""Commands in documents, configurations and the launchers' page are commands that there are."""

import re
import shlex
from pathlib import Path

import pytest

import psa_jax
from psa_jax import cli
from psa_jax.tools.configs import load_config

ROOT = Path(psa_jax.__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").rglob("*.py")),
    ROOT / "launch" / "README.md",
]
LEAST = {
    "README.md": 6,
    "docs/commands.md": 18,
    "docs/training.md": 5,
    "configs/sd15.py": 4,
    "configs/tiny.py": 2,
    "launch/README.md": 3,
}
"""Commands that a document has."""


def commands(path: Path) -> list[list[str]]:
    """Words after `psa-jax` of every command on lines of its own, also one that a launcher is given after `--`."""
    text = re.sub(r"\\\n\s+", "", path.read_text(encoding="utf-8"))  # a line that goes on
    before = r"(?:(?:\.venv/bin/)?psa-jax|(?:python )?launch/\S+ .*?-- (?:\S*/)?psa-jax) "
    indent = "    " if path.suffix == ".md" else ""
    found = re.findall(f"^{indent}{before}([a-z].*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_of_the_documents_are_taken(path: Path, monkeypatch) -> None:
    """By the parsers themselves; what is in backticks inside a sentence may be a part of a command."""
    monkeypatch.chdir(ROOT)
    found = commands(path)
    assert len(found) >= LEAST.get(path.relative_to(ROOT).as_posix(), 0)
    for name, words in map(cli.command_of, found):
        args, rest = cli._command_parser(name).parse_known_args(words)
        if getattr(args, "takes_config", False):
            _, rest = load_config([f"--config={args.config}", *rest])
        assert not rest, (name, words)
