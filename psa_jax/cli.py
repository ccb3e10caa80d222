"""`psa-jax COMMAND`: one table of commands; a command's module is imported only when the command runs.

Exit codes: 0 success; 1 an error of one line; 2 wrong usage; 75 stopped from outside, by a signal or because another
process of the group died (run the same command again to continue); 130 interrupted. Any other exception is a bug and
shows its traceback.
"""

import argparse
import contextlib
import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import psa_jax
from psa_jax.compiled import keep_compiled
from psa_jax.errors import STOPPED, PeerLost, PSAError, Stopped
from psa_jax.leaving import leave_group
from psa_jax.renamed import COMMANDS as OLD_COMMANDS
from psa_jax.renamed import print_notice
from psa_jax.rules import quoted
from psa_jax.tools import arguments, drawing_arguments, evaluate_arguments, sweep_arguments
from psa_jax.tools.sources import bring_sources


class Command(NamedTuple):
    """A command: what the line of `psa-jax --help` says, its flags, and the module in `psa_jax.tools` that runs it."""

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    module: str

    def run(self, args: Namespace) -> int:
        """Imports the module, calls its `run(args)` and returns the exit code, which is 0 for None.

        What the command reads from buckets is on this machine by then.
        """
        keep_compiled(os.environ)
        if self.module != "sweep":  # hands names on, and a copy here is of no use elsewhere
            bring_sources(args)
        return importlib.import_module(f"psa_jax.tools.{self.module}").run(args) or 0


COMMANDS = {
    "demo": Command("train, generate, judge and report on the embedded tiny model", arguments.demo, "demo"),
    "population": Command("sample user profiles as SAGE did", arguments.population, "population"),
    "encode": Command("encode user profiles as embeddings", arguments.encode, "encode"),
    "levels": Command("cluster users by what they ban", arguments.levels, "levels"),
    "mini": Command("render SAGE-mini, a small world in the layout of SAGE", arguments.mini, "mini"),
    "check": Command("verify every row and picture of a SAGE folder", arguments.check, "check"),
    "build": Command("encode SAGE or own pairs as shards for a base model", arguments.build, "build"),
    "pretrain": Command("train the embedded base model and the oracle", arguments.experiment, "pretrain"),
    "train": Command("train an adapter on preference pairs", arguments.train, "train"),
    "compare": Command("train several kinds of adapter and objectives, and compare them", arguments.compare, "compare"),
    "sweep": Command("train every point of a sweep of a configuration", sweep_arguments.points, "sweep"),
    "sweep report": Command(
        "tabulate and draw what the points of a sweep measured", sweep_arguments.report, "sweep_report"
    ),
    "curves": Command("draw the learning curves of a run as a page", arguments.curves, "curves"),
    "memory": Command(
        "compute the memory of a training step, also on TPUs that are not here", arguments.memory, "memory"
    ),
    "aot": Command("compile for TPUs that are not here: memory, time and cost by part", arguments.aot, "aot"),
    "generate": Command("generate pictures for a user", drawing_arguments.generate, "generate"),
    "explain": Command("show what an adapter replaces in a prompt, and why", drawing_arguments.explain, "explain"),
    "playground": Command(
        "serve a page to this machine: one prompt, several users side by side",
        drawing_arguments.playground,
        "playground",
    ),
    "evaluate": Command("judge folders of pictures and compare their methods", evaluate_arguments.pictures, "evaluate"),
    "evaluate prompts": Command(
        "list the prompts of a set that the field evaluates on", evaluate_arguments.prompts, "evaluate_prompts"
    ),
    "evaluate erase": Command(
        "write a base model without some concepts, a baseline", evaluate_arguments.erase, "evaluate_erase"
    ),
    "evaluate verdicts": Command(
        "total up a file of what a judge said", evaluate_arguments.verdicts, "evaluate_verdicts"
    ),
    "evaluate limits": Command(
        "measure where an adapter of the small world fails", evaluate_arguments.limits, "evaluate_limits"
    ),
    "export": Command("write a trained adapter as a file", arguments.export, "export"),
    "import": Command("read an adapter file for a base model", arguments.import_, "import_"),
    "doctor": Command("say what a training lacks on this machine, and what mends it", arguments.doctor, "doctor"),
    "bench": Command("measure speed, also against the torch original's approach", arguments.bench, "bench"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
      argv: the words after `psa-jax`; those of the process by default.

    Raises:
      SystemExit: code 0 for --help and --version, 2 for wrong usage, as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in OLD_COMMANDS:
        new = OLD_COMMANDS[argv[0]]
        print_notice(f"psa-jax {argv[0]}", f"psa-jax {new}")
        argv[0] = new
    if not argv or argv[0] not in COMMANDS:
        parser = _parser()
        parser.parse_args(argv)  # --help and --version exit here
        parser.error("COMMAND comes first")
    name, words = command_of(argv)
    debug = "--debug" in words
    try:
        with _missing_packages_named(name):
            code = _run(name, words)
        _flush_output()  # a full disk behind `> file` must show before the exit code is decided
    except KeyboardInterrupt:
        print("psa-jax: interrupted", file=sys.stderr)
        code = 130
        leave_group(code)
    except (PSAError, OSError) as error:
        with contextlib.suppress(OSError):
            _flush_output()
        code = STOPPED if isinstance(error, Stopped) else 1
        if debug:
            leave_group(code, error, refused=not isinstance(error, Stopped))
            raise
        if not isinstance(error, BrokenPipeError):  # the reader, such as `| head`, has closed the pipe
            print(f"psa-jax: error: {_one_line(error)}", file=sys.stderr)
        if not isinstance(error, Stopped) or isinstance(error, PeerLost):  # a signal stops all processes
            leave_group(code, refused=not isinstance(error, Stopped))
    except Exception as error:
        leave_group(1, error)
        raise
    return code


def command_of(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the command, which may have two words, and the words after it.

    A folder with the name of a second word is given as ./verdicts.
    """
    length = 2 if " ".join(argv[:2]) in COMMANDS else 1
    return " ".join(argv[:length]), list(argv[length:])


@contextlib.contextmanager
def _missing_packages_named(name: str) -> Iterator[None]:
    """Names a package that is not installed in an error of one line, as after an installation for `psa_jax.torch`."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "psa_jax").partition(".")[0]
        if module == "psa_jax":
            raise
        raise PSAError(
            f"psa-jax {name} needs {module}, which is not installed; install psa_jax with its dependencies, without "
            "--no-deps (only psa_jax.torch works without them)"
        ) from error


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes again when it exits, would fail again and return 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _run(name: str, words: list[str]) -> int:
    parser = _command_parser(name)
    try:
        args, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        if error.argument_name is None:  # a missing flag: raised here since Python 3.12
            parser.error(str(error))
        message = error.message
        for value in (word.partition("=")[2] or word for word in words):
            message = message.replace(repr(value), quoted(value))
        raise PSAError(f"{error.argument_name}: {message}") from error
    if getattr(args, "takes_config", False) and args.config is not None:
        from psa_jax.tools.configs import load_config  # imported late: --help must be quick

        # argparse knows --config, but not --config.KEY=VALUE: the keys are those of the file.
        args.config, rest = load_config([f"--config={args.config}", *rest])
        with args.config.unlocked():
            args.config.update({name: vars(args)[name] for name in arguments.BASE_MODEL if vars(args).get(name)})
    if rest:
        keys = getattr(args, "takes_config", False) and args.config or ()
        close = [f"--config.{word[2:]}" for word in rest if word.startswith("--") and word[2:].split("=")[0] in keys]
        hint = f"; did you mean {' '.join(close)}?" if close else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    args.words = words  # as they were given, for what says how it was made
    return COMMANDS[name].run(args)


def _parser() -> ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = ArgumentParser(
        prog="psa-jax",
        description=psa_jax.__doc__.partition("\n")[0],
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"psa-jax {psa_jax.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="psa-jax COMMAND --help explains one")
    return parser


def _command_parser(name: str) -> ArgumentParser:
    command = COMMANDS[name]
    description = f"{command.help[0].upper()}{command.help[1:]}."
    # No abbreviations: --conf would change its meaning with a new flag of that name. No exit on errors: a bad value is
    # an error of one line like any other, without the usage above it.
    parser = ArgumentParser(prog=f"psa-jax {name}", description=description, allow_abbrev=False, exit_on_error=False)
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    return parser


def _one_line(error: Exception) -> str:
    """The text of an error on one line; of an OSError, its path and reason."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename
        return f"{where}: {error.strerror}" if where else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
