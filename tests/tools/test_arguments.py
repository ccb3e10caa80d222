"""Every flag of every command: a value that it does not take is one line, said before anything is read or written."""

import argparse
from pathlib import Path

import pytest

from psa_jax import cli
from psa_jax.diffusion.generate import UNCONDITIONAL
from psa_jax.diffusion.sampler_registry import SAMPLERS
from psa_jax.profiles.encoder_registry import ENCODERS
from psa_jax.tools import arguments, export, flags

TEXT = {"forget", "methods", "topology", "coordinator", "variant", "profile", "user", "prompt", "negative"}
TEXT |= {"baseline", "sld_concept", "judges", "method", "split", "judge_model", "launcher_args", "metric"}
"""What is neither a path nor a number."""
SOURCES = (flags.source, flags.source_place, flags.run_folder)
"""What may be in a bucket."""
PATHS = (flags.path, flags.place, *SOURCES)
IN_A_BUCKET = "gs://bucket/x"
NO_PATHS = {
    IN_A_BUCKET: "gs://bucket/x: only paths on this machine can be used here; give one, and copy from or to there you",
    "gs://me:secret@bucket/x": "gs://…: an address with credentials, a port or a query; ",
    "https://host/x": "https://host/x: only paths on this machine",
    "": "an empty path; give one, such as . for the folder you are in",
    "a\udcff.safetensors": "'a\\udcff.safetensors': a path that is not UTF-8",
    "a\0b": "'a\\x00b': a path cannot hold a zero byte",
}
NUMBERS = ("0", "-1", "x", "nan", "inf", "1e400", "1.5", "", "true", "9" * 30)
TAKEN = {
    "seed": {"0"},
    "host": {"0"},
    "port": {"0"},
    "process_id": {"0"},
    "seconds": {"1.5", "9" * 30},
    "scale": {"0", "-1", "1.5", "9" * 30},
    "lora_scale": {"0", "-1", "1.5", "9" * 30},
    "guidance": {"0", "1.5", "9" * 30},
    "guidance_rescale": {"0"},
    "eta": {"0"},
    "requests": {"0"},
    "judge_timeout": {"1.5", "9" * 30},
    "learning_rate": {"1.5", "9" * 30},
    "strength": {"1.5", "9" * 30},
    "search_seed": {"0"},
}
"""Which of NUMBERS each flag takes."""


def actions() -> list[tuple[str, argparse.Action]]:
    """Every flag and positional that takes a free value, with its command."""
    return [
        (command, action)
        for command in cli.COMMANDS
        for action in cli._command_parser(command)._actions
        if action.nargs is None and action.choices is None
    ]


def test_what_may_be_in_a_bucket():
    """What is only read, and where a training writes; nothing else that a command writes."""
    taken = {(command, action.dest) for command, action in actions() if action.type in SOURCES}
    assert {command for command, dest in taken if dest == "workdir"} == {"train", "doctor"}
    assert {dest for _, dest in taken} == {
        *(
            "model",
            "vae",
            "tokenizer",
            "model_config",
            "adapter",
            "table",
            "lora",
            "uce",
            "prompts",
            "inception",
            "init_from",
        ),
        *("file", "report", "users", "manifest", "clip", "reference", "q16_prompts", "source", "levels", "concepts"),
        "workdir",
    }


def cases(paths: bool) -> list:
    return [
        pytest.param(command, action, id=f"{command}-{action.dest}")
        for command, action in actions()
        if action.dest not in TEXT and (action.type in PATHS) == paths
    ]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Returns a function: words of a command -> exit code, lines of stderr. The command itself does nothing."""
    monkeypatch.chdir(tmp_path)

    def main(command: str, *words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(cli.Command, "run", lambda self, args: 0)
        try:
            code = cli.main([command, *words])
        except SystemExit as leaving:
            code = leaving.code
        assert list(tmp_path.iterdir()) == []
        return code, capsys.readouterr().err.splitlines()

    return main


def words(command: str, action: argparse.Action, value: str) -> list[str]:
    """Nothing else that the command needs but what comes before: what is read first is said first."""
    if action.option_strings:
        return [f"{action.option_strings[0]}={value}"]
    before = cli._command_parser(command)._get_positional_actions()
    return [each.choices[0] for each in before if each.choices] + [value]


def test_every_flag_is_a_path_or_a_number_or_listed_here():
    untyped = {action.dest for _, action in actions() if action.type is None}
    assert untyped == TEXT
    assert {Path, int, float, str} & {action.type for _, action in actions()} == set()


@pytest.mark.parametrize(("command", "action"), cases(paths=True))
@pytest.mark.parametrize("value", NO_PATHS)
def test_what_is_no_path_here(run, command: str, action: argparse.Action, value: str):
    code, lines = run(command, *words(command, action, value))
    if value == IN_A_BUCKET and action.type in SOURCES:  # taken, without what else the command needs
        assert code == 0 or (code == 2 and lines[0].startswith("usage: "))
        return
    assert code == 1 and len(lines) == 1
    name = action.option_strings[0] if action.option_strings else action.metavar
    assert lines[0].startswith(f"psa-jax: error: {name}: ") and NO_PATHS[value] in lines[0]


@pytest.mark.parametrize(("command", "action"), cases(paths=False))
def test_numbers(run, command: str, action: argparse.Action):
    for value in NUMBERS:
        code, lines = run(command, *words(command, action, value))
        if code == 2:  # taken, without what else the command needs
            assert lines[0].startswith("usage: ")
            assert value in TAKEN.get(action.dest, set())
        else:
            assert value not in TAKEN.get(action.dest, set())
            (line,) = lines
            assert line.startswith(f"psa-jax: error: {action.option_strings[0]}: {value!r} ") and "; give " in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate --seed=-1", "--seed: '-1' does not fit; give a whole number from 0 to 18446744073709551615"),
        ("generate --steps=0", "--steps: '0' does not fit; give a whole number from 1 to 2147483647"),
        ("generate --images=0", "--images: '0' does not fit; give a whole number from 1 to 2147483647"),
        (
            f"generate --batch-size={'9' * 5000}",
            f"--batch-size: '{'9' * 79}… does not fit; give a whole number from 1 ",
        ),
        (f"generate --size={'9' * 5000}", f"--size: '{'9' * 79}… is no size; "),
        ("generate --guidance=nan", "--guidance: 'nan' does not fit; give a finite number of 0 or more"),
        ("generate --eta=-1", "--eta: '-1' does not fit; give a finite number of 0 or more and at most 1"),
        ("generate --lora-scale=inf", "--lora-scale: 'inf' does not fit; give a finite number"),
        ("generate --size=0x64", "--size: '0x64' is no size; give such as 768 or 512x768 (height x width)"),
        ("mini --users=-1", "--users: '-1' does not fit; give a whole number from 1 to 9999999"),
        ("population --n=0", "--n: '0' does not fit; give a whole number from 1 to 9999999"),
        ("bench --seconds=nan", "--seconds: 'nan' does not fit; give a finite number above 0"),
        ("bench --size=96", "--size: '96' does not fit; give a multiple of 64, such as 128"),
        ("check --processes=0", "--processes: '0' does not fit; give a whole number from 1 to 65536"),
        ("build --resolution=-8", "--resolution: '-8' does not fit; give a multiple of 8, such as 512"),
        ("train --num-processes=0", "--num-processes: '0' does not fit; give a whole number from 1 to 65536"),
    ],
)
def test_what_is_said(run, words: str, said: str):
    code, (line,) = run(*words.split())
    assert code == 1 and line.startswith(f"psa-jax: error: {said}") and len(line) < 250


def test_a_value_that_is_missing_or_none_of_the_choices(run):
    assert run("generate", "--steps") == (1, ["psa-jax: error: --steps: expected one argument"])
    code, (line,) = run("generate", "--dtype=float8")
    assert code == 1 and line.startswith("psa-jax: error: --dtype: invalid choice: 'float8' (choose from ")
    for words in (["--dtype=" + "8" * 5000], ["--dtype", "8" * 5000]):
        code, (line,) = run("generate", *words)
        assert code == 1 and len(line) < 200 and f"invalid choice: '{'8' * 79}… (choose from " in line


def test_what_is_taken_is_read_as_typed():
    parser = cli._command_parser("generate")
    needed = ["--model=tiny", "--out=out/", "--prompt=x"]
    args = parser.parse_args([*needed, "--size=512x768", "--seed=18446744073709551615", "--scale=-0.5"])
    assert (args.model, args.out, args.size, args.seed, args.scale) == (
        "tiny",
        Path("out"),
        (512, 768),
        2**64 - 1,
        -0.5,
    )
    assert parser.parse_args([*needed, "--size=768"]).size == (768, 768)
    assert parser.parse_args([*needed[1:], "--model=./m/"]).model == "./m/"
    for flag, table in (("unconditional", UNCONDITIONAL), ("sampler", SAMPLERS)):
        (found,) = [action for action in parser._actions if action.dest == flag]
        assert tuple(found.choices) == tuple(table)


def test_the_formats_of_the_help_are_those_that_are_written():
    assert list(arguments.FORMATS) == list(export.FORMATS)


def test_the_encoders_of_the_help_are_those_that_exist():
    (action,) = [action for action in cli._command_parser("encode")._actions if action.dest == "encoder"]
    assert action.choices == list(ENCODERS)
