"""`psa-jax COMMAND`: one table of commands; a command's module is imported only when the command runs.

Exit codes: 0 done, 1 a one-line error, 2 wrong usage, 75 stopped from outside (by a signal, with a checkpoint; or
another process of the group is gone): the same command goes on, 130 interrupted. Anything else that is raised is a bug
and shows its traceback.
"""

import argparse
import contextlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import psa_jax
from psa_jax.errors import STOPPED, PeerLost, PSAError, Stopped
from psa_jax.rules import quoted
from psa_jax.tools import arguments


@dataclass(frozen=True)
class Command:
    """What `psa-jax --help` says, the flags, and what runs (None counts as exit code 0)."""

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int | None]


def _population(args: Namespace) -> int:
    from psa_jax.tools import draw

    return draw.population(args)


def _encode(args: Namespace) -> int:
    from psa_jax.tools import encode

    return encode.run(args)


def _levels(args: Namespace) -> int:
    from psa_jax.tools import levels

    return levels.run(args)


def _mini(args: Namespace) -> int:
    from psa_jax.tools import draw

    return draw.mini(args)


def _check(args: Namespace) -> int:
    from psa_jax.tools import check

    return check.run(args)


def _build(args: Namespace) -> int:
    from psa_jax.tools import build

    return build.run(args)


def _pretrain(args: Namespace) -> int:
    from psa_jax.tools import pretrain

    return pretrain.run(args.config, args.workdir)


def _train(args: Namespace) -> int:
    from psa_jax.tools import train

    return train.run(args)


def _generate(args: Namespace) -> int:
    from psa_jax.tools import generate

    return generate.run(args)


def _export(args: Namespace) -> int:
    from psa_jax.tools import transfer

    return transfer.export(args)


def _import(args: Namespace) -> int:
    from psa_jax.tools import transfer

    return transfer.import_(args)


def _demo(args: Namespace) -> int:
    from psa_jax.tools import demo

    return demo.run(args.config, args.workdir, compare=args.compare, record=args.record, all_ways=args.all_ways)


def _memory(args: Namespace) -> int:
    from psa_jax.tools import memory

    return memory.run(args)


def _bench(args: Namespace) -> int:
    from psa_jax.tools import bench

    return bench.run(args)


COMMANDS: dict[str, Command] = {
    "demo": Command("train, draw, judge and report on the embedded tiny model", arguments.demo, _demo),
    "population": Command("draw user profiles as SAGE did", arguments.population, _population),
    "encode": Command("encode user profiles as embeddings", arguments.encode, _encode),
    "levels": Command("cluster users by what they ban", arguments.levels, _levels),
    "mini": Command("draw SAGE-mini, a small world in the layout of SAGE", arguments.mini, _mini),
    "check": Command("verify every row and picture of a SAGE folder", arguments.check, _check),
    "build": Command("encode a SAGE folder as shards for a base model", arguments.build, _build),
    "pretrain": Command("train the embedded base model and the oracle", arguments.experiment, _pretrain),
    "train": Command("train an adapter on preference pairs", arguments.train, _train),
    "memory": Command(
        "compute the memory of a training step, also on TPUs that are not here", arguments.memory, _memory
    ),
    "generate": Command("draw pictures for a user", arguments.generate, _generate),
    "export": Command("write a trained adapter as a file", arguments.export, _export),
    "import": Command("read an adapter file for a base model", arguments.import_, _import),
    "bench": Command("measure speed against the way of the torch original", arguments.bench, _bench),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Wrong usage leaves through SystemExit(2), as argparse does."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:
        parser = _parser()
        parser.parse_args(argv)  # --help and --version leave here
        parser.error("COMMAND comes first")
    name, words = argv[0], argv[1:]
    debug = "--debug" in words
    try:
        with _nothing_missing(name):
            code = _run(name, words)
        _flush_output()  # a full disk behind `> file` shows here, not after the exit code is decided
    except KeyboardInterrupt:
        print("psa-jax: interrupted", file=sys.stderr)
        code = 130
        _leave_group(code)
    except (PSAError, OSError) as error:
        with contextlib.suppress(OSError):
            _flush_output()
        code = STOPPED if isinstance(error, Stopped) else 1
        if debug:
            _leave_group(code, error, refused=not isinstance(error, Stopped))
            raise
        if not isinstance(error, BrokenPipeError):  # the reader (`| head`) has left: nobody to tell
            print(f"psa-jax: error: {_one_line(error)}", file=sys.stderr)
        if not isinstance(error, Stopped) or isinstance(error, PeerLost):  # a signal stops all processes together
            _leave_group(code, refused=not isinstance(error, Stopped))
    except Exception as error:
        _leave_group(1, error)
        raise
    return code


@contextlib.contextmanager
def _nothing_missing(name: str) -> Iterator[None]:
    """An installation without all dependencies, such as one for `psa_jax.torch` alone, is told in one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "psa_jax").partition(".")[0]
        if module == "psa_jax":
            raise
        raise PSAError(
            f"psa-jax {name} needs {module}, which is not installed; install psa_jax with its dependencies, so without "
            "--no-deps (psa_jax.torch alone can do without them)"
        ) from error


def _leave_group(code: int, error: Exception | None = None, refused: bool = False) -> None:
    """One of several processes that train together ends here: it must not wait for the others, who wait for it."""
    together = sys.modules.get("psa_jax.training.distributed")
    if together is not None:
        together.hard_exit(code, error, refused)


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        # What is left would fail once more when Python ends, which then answers with code 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _run(name: str, words: list[str]) -> int:
    parser = _command_parser(name)
    try:
        args, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        if error.argument_name is None:  # a flag that is missing: from Python 3.12 on it comes here, too
            parser.error(str(error))
        said = error.message
        for value in (word.partition("=")[2] or word for word in words):
            said = said.replace(repr(value), quoted(value))
        raise PSAError(f"{error.argument_name}: {said}") from error
    if getattr(args, "takes_config", False):
        from psa_jax.tools.configs import load_config  # not above: it takes a third of the time that --help has

        # argparse knows --config; it leaves --config.KEY=VALUE, whose keys only the file knows.
        args.config, rest = load_config([f"--config={args.config}", *rest])
        with args.config.unlocked():
            args.config.update({name: vars(args)[name] for name in arguments.BASE_MODEL if vars(args).get(name)})
    if rest:
        keys = args.config if getattr(args, "takes_config", False) else ()
        meant = [f"--config.{word[2:]}" for word in rest if word.startswith("--") and word[2:].split("=")[0] in keys]
        hint = f"; did you mean {' '.join(meant)}?" if meant else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return COMMANDS[name].run(args) or 0


def _parser() -> ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = ArgumentParser(
        prog="psa-jax",
        description=psa_jax.__doc__,
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"psa-jax {psa_jax.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="psa-jax COMMAND --help explains one")
    return parser


def _command_parser(name: str) -> ArgumentParser:
    command = COMMANDS[name]
    description = f"{command.help[0].upper()}{command.help[1:]}."
    # No abbreviations: --conf would swallow what a later flag of that name means. A value that does not fit is an
    # error as any other, of one line: its advice would be lost under the usage.
    parser = ArgumentParser(prog=f"psa-jax {name}", description=description, allow_abbrev=False, exit_on_error=False)
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show a traceback on errors")
    return parser


def _one_line(error: Exception) -> str:
    """What happened and where, on one line; an OSError is reduced to path and reason."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename2 or error.filename
        return f"{where}: {error.strerror}" if where else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
