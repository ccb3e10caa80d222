"""The command line: help without heavy imports, exit codes, one-line errors, config files."""

import ast
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import psa_jax
from psa_jax import cli, leaving
from psa_jax.errors import PeerLost, PSAError, Stopped
from psa_jax.renamed import UNTIL, print_notice
from psa_jax.tools import arguments
from psa_jax.tools.configs import load_config, read_config, shipped

ROOT = Path(psa_jax.__file__).resolve().parents[1]


def psa_jax_command(*words: str, **options) -> subprocess.CompletedProcess:
    """Runs `python -m psa_jax` as a user would, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "psa_jax", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def population_into(stdout: int, folder: Path) -> subprocess.CompletedProcess:
    """Runs a command whose last line goes to `stdout`, held back until the end as it is by default."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "psa_jax", "population", "--n=1", f"--out={folder}/users.csv"]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, timeout=120
    )


def run_with(monkeypatch: pytest.MonkeyPatch, run, *words: str, add_arguments=lambda parser: None) -> int:
    """Runs a command `probe` that exists for this test only."""
    monkeypatch.setitem(sys.modules, "psa_jax.tools.probe", SimpleNamespace(run=run))
    monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("test the command line", add_arguments, "probe"))
    return cli.main(["probe", *words])


def raises(error: BaseException):
    """A command that does nothing but fail."""

    def run(args):
        raise error

    return run


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config with one key of every type."""
    path = tmp_path / "sample.py"
    path.write_text(
        """
import ml_collections
from ml_collections import config_dict

def get_config(arg="plain"):
    config = ml_collections.ConfigDict()
    config.arg = arg
    config.steps = 100
    config.shuffle = True
    config.name = "adam"
    config.widths = (32, 64)
    config.limit = config_dict.placeholder(float)
    config.data = config_dict.placeholder(str)
    config.anything = None
    config.optimizer = dict(learning_rate=1e-3, schedule=dict(warmup=10))
    return config
"""
    )
    return path


# --- help and usage


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_is_quick_and_says_what_there_is(command: str | None) -> None:
    words = ["--help"] if command is None else [command, "--help"]
    began = _children_seconds()
    done = psa_jax_command(*words)
    seconds = _children_seconds() - began
    assert done.returncode == 0
    expected = list(cli.COMMANDS) if command is None else ["--debug", cli.COMMANDS[command].help[1:]]
    assert all(text in done.stdout for text in expected)
    assert seconds < 0.5


def _children_seconds() -> float:
    """CPU time: the clock on the wall also shows what else the machine has to do."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_imports_no_library(command: str) -> None:
    code = (
        "import sys, psa_jax.cli\n"
        "try: psa_jax.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'jax', 'flax', 'numpy', 'transformers', 'ml_collections', 'torch'} & set(sys.modules)))"
    )
    words = [word for word in (command, "--help") if word]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_is_the_package_version() -> None:
    done = psa_jax_command("--version")
    assert (done.returncode, done.stdout) == (0, f"psa-jax {psa_jax.__version__}\n")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["draw"],
        ["--", "mini"],
        ["population"],
        ["population", "--out=x.csv", "--color=red"],
        ["population", "--ou=x.csv"],
        ["mini", "--out=x", "extra"],
    ],
)
def test_wrong_usage_exits_2_with_usage(words: list[str], tmp_path: Path) -> None:
    done = psa_jax_command(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: psa-jax")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# --- commands that are there


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_is_run_by_the_module_of_its_name(name: str) -> None:
    module = cli.COMMANDS[name].module
    assert module.removesuffix("_") == name.replace(" ", "_")
    tree = ast.parse((ROOT / "psa_jax" / "tools" / f"{module}.py").read_text())
    (run,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    assert [argument.arg for argument in run.args.args] == ["args"]


def test_an_old_name_of_a_command_works_and_is_noticed(monkeypatch, capsys) -> None:
    monkeypatch.setitem(cli.OLD_COMMANDS, "old-probe", "probe")
    print_notice.cache_clear()
    seen = []
    assert run_with(monkeypatch, seen.append) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["old-probe", "--debug"]) == 0
    assert seen[1].debug
    line = f"psa-jax: psa-jax old-probe is now called psa-jax probe; the old name works until psa_jax {UNTIL}\n"
    assert capsys.readouterr().err == line


def test_fit_is_memory(capsys) -> None:
    print_notice.cache_clear()
    with pytest.raises(SystemExit) as leaving:
        cli.main(["fit", "--help"])
    assert leaving.value.code == 0
    out, err = capsys.readouterr()
    assert "usage: psa-jax memory" in out
    assert err == f"psa-jax: psa-jax fit is now called psa-jax memory; the old name works until psa_jax {UNTIL}\n"


def test_every_old_command_has_a_new_one() -> None:
    assert set(cli.OLD_COMMANDS.values()) <= set(cli.COMMANDS)
    assert not set(cli.OLD_COMMANDS) & set(cli.COMMANDS)


def test_who_joins_a_group_leaves_it_on_failure(monkeypatch) -> None:
    monkeypatch.setattr(leaving, "_registered", [])
    left = []

    def leave(code, error=None, refused=False) -> None:
        left.append((code, str(error), refused))

    def fail(error: BaseException):
        def run(args) -> None:
            leaving.on_failure(leave)
            raise error

        return run

    assert run_with(monkeypatch, fail(PSAError("no"))) == 1
    assert run_with(monkeypatch, fail(Stopped("signal"))) == 75
    assert run_with(monkeypatch, fail(PeerLost("gone"))) == 75
    assert run_with(monkeypatch, fail(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, fail(ZeroDivisionError("bug")))
    assert left == [(1, "None", True), (75, "None", False), (130, "None", False), (1, "bug", False)]


def test_population_writes_users_and_a_last_line_for_programs(tmp_path: Path) -> None:
    out = tmp_path / "users.csv"
    done = psa_jax_command("population", "--n=3", f"--out={out}")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1]) == {"users": 3, "seed": 2025, "out": str(out)}
    assert [line.split(",")[0] for line in out.read_text().splitlines()] == ["User_ID", "0000001", "0000002", "0000003"]


def test_mini_writes_the_splits(tmp_path: Path) -> None:
    out = tmp_path / "sage"
    done = psa_jax_command("mini", f"--out={out}", "--users=1", "--seed=4")
    assert done.returncode == 0 and "rendering SAGE-mini: 18/18 users" in done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert rows == {folder.name: len((folder / "metadata.jsonl").read_text().splitlines()) for folder in out.iterdir()}


# --- errors


def test_an_error_is_one_line_and_exit_1(tmp_path: Path) -> None:
    done = psa_jax_command("population", "--n=3", f"--out={tmp_path}/absent/users.csv")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"psa-jax: error: {tmp_path}/absent/users.csv: ")


def test_debug_shows_the_traceback() -> None:
    done = psa_jax_command("population", "--n=0", "--out=users.csv", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("psa_jax.errors.PSAError: --n: ")


def test_a_message_of_several_lines_becomes_one(monkeypatch, capsys) -> None:
    assert run_with(monkeypatch, raises(PSAError("a.py: broken\n  here; mend it"))) == 1
    assert capsys.readouterr().err == "psa-jax: error: a.py: broken here; mend it\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "out/a.png"), "out/a.png: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_what_the_system_refuses_is_one_line(error: OSError, line: str, monkeypatch, capsys) -> None:
    assert run_with(monkeypatch, raises(error)) == 1
    assert capsys.readouterr().err == f"psa-jax: error: {line}\n"


def test_output_that_cannot_be_written_exits_1(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = population_into(full.fileno(), tmp_path)
    assert (done.returncode, done.stderr) == (1, "psa-jax: error: No space left on device\n")


def test_a_reader_that_left_is_not_told(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = population_into(writer, tmp_path)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_interrupted_exits_130(monkeypatch, capsys) -> None:
    assert run_with(monkeypatch, raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "psa-jax: interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, lambda args: 1 // 0)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1)])
def test_exit_code_is_what_the_command_returns(result: int | None, code: int, monkeypatch) -> None:
    assert run_with(monkeypatch, lambda args: result) == code


# --- config files


def test_a_command_with_a_config_gets_it_read_and_overridden(config_file: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    words = [
        f"--config={config_file}:wide",
        "--config.steps=7",
        "--config.widths=(8, 16, 32)",
        "--config.optimizer.learning_rate",
        "-2",
        f"--workdir={tmp_path}",
    ]
    assert run_with(monkeypatch, seen.append, *words, add_arguments=arguments.experiment) == 0
    config = seen[0].config
    assert (config.arg, config.steps, config.widths) == ("wide", 7, (8, 16, 32))
    assert config.optimizer.learning_rate == -2.0
    assert seen[0].workdir == tmp_path


def test_a_command_with_a_config_refuses_other_flags(config_file: Path, monkeypatch) -> None:
    with pytest.raises(SystemExit) as leaving:
        run_with(
            monkeypatch, print, f"--config={config_file}", "--workdir=w", "--colour", add_arguments=arguments.experiment
        )
    assert leaving.value.code == 2


def test_an_unknown_key_is_one_line_and_exit_1(config_file: Path, monkeypatch, capsys) -> None:
    words = [f"--config={config_file}", "--config.optimizer.learning_rat=1", "--workdir=w"]
    assert run_with(monkeypatch, print, *words, add_arguments=arguments.experiment) == 1
    assert capsys.readouterr().err == (
        f"psa-jax: error: --config.optimizer.learning_rat: {config_file} has no key optimizer.learning_rat; "
        "did you mean optimizer.learning_rate?\n"
    )


def test_load_config_keeps_other_arguments_and_locks(config_file: Path) -> None:
    argv = ["--before", "--config", str(config_file), "--config.steps=1", "--config.steps=2", "--after=3", "x"]
    config, rest = load_config(argv)
    assert rest == ["--before", "--after=3", "x"]
    assert (config.arg, config.steps) == ("plain", 2)
    assert config.is_locked
    assert config.optimizer.schedule.is_locked


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "12", 12),
        ("shuffle", "false", False),
        ("name", "12", "12"),
        ("widths", "(1, 2, 3)", (1, 2, 3)),
        ("widths", "5", (5,)),
        ("limit", "3", 3.0),
        ("limit", "none", None),
        ("data", "shards", "shards"),
        ("anything", "[1, 2]", (1, 2)),
        ("anything", "word", "word"),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.schedule.warmup", "0", 0),
    ],
)
def test_a_value_is_read_as_the_type_in_the_file(config_file: Path, key: str, text: str, value) -> None:
    config, _ = load_config([f"--config={config_file}", f"--config.{key}={text}"])
    for name in key.split("."):
        config = config[name]
    found = tuple(config) if isinstance(config, (list, tuple)) else config
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.step=1", r"has no key step; did you mean steps\?"),
        ("--config.colour=1", r"has no key colour; keys there: anything, arg, data, limit, name, optimizer, "),
        ("--config.optimizer=1", r"is a group in .*; set one of its keys: learning_rate, schedule"),
        ("--config.steps.more=1", r"steps of .* is a value, not a group"),
        ("--config.steps=1.5", r"--config.steps: '1.5' does not fit; give a value of type int, such as 100"),
        ("--config.shuffle=2", r"'2' does not fit; give true or false"),
        ("--config.widths=(1,", r"does not fit; give a value of type tuple"),
        ("--config.steps", r"--config.steps: no value"),
    ],
)
def test_a_bad_override_names_key_and_file(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(PSAError, match=message):
        load_config([f"--config={config_file}", override])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(:", r"line 1: invalid syntax"),
        ("import absent_module_of_psa_jax", r"ModuleNotFoundError: No module named"),
        ("x = 1", r"has no get_config\(\)"),
        ("def get_config(): return {}", r"gave dict; it must return a ConfigDict"),
        ("def get_config(): return 1 // 0", r"get_config failed \(ZeroDivisionError"),
        (
            "from ml_collections import config_dict as c\n"
            "def get_config(): return c.ConfigDict({'data': c.required_placeholder(str)})",
            r"lock failed \(RequiredValueError",
        ),
        ("def get_config(size): return size", r"missing a required argument: 'size'; write .*bad.py:ARG"),
    ],
)
def test_a_bad_config_file_is_named(source: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(PSAError, match=message) as caught:
        load_config([f"--config={path}"])
    assert str(caught.value).startswith(str(path))


def test_a_config_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PSAError, match=r"absent.py: no such config file"):
        load_config([f"--config={tmp_path / 'absent.py'}"])
    with pytest.raises(PSAError, match=r"give --config=NAME\[:arg\] \(.*\) or --config=FILE"):
        load_config(["--workdir=w"])
    (tmp_path / "plain.py").write_text("def get_config(): return None")
    with pytest.raises(PSAError, match=r"too many positional arguments; write .*plain.py alone"):
        load_config([f"--config={tmp_path / 'plain.py'}:wide"])


def test_a_shipped_config_goes_by_its_name(pytestconfig) -> None:
    folder = pytestconfig.rootpath / "configs"
    assert shipped() == {name: folder / f"{name}.py" for name in ("sd15", "sd21", "sdxl", "tiny")}
    for name, path in shipped().items():
        for arg in ("", ":smoke"):
            assert read_config(f"{name}{arg}").to_dict() == read_config(f"{path}{arg}").to_dict()
    assert load_config(["--config=tiny:smoke", "--config.steps=7"])[0].steps == 7


def test_names_that_are_none_or_two(tmp_path: Path, monkeypatch, pytestconfig) -> None:
    for name in ("common", "tinny", "", "..", "tiny.py", "configs/tiny.py", "/tiny"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(PSAError, match=r"no such config file; .*\(sd15, sd21, sdxl, tiny\)$"):
            read_config(name)
    own = tmp_path / "tiny.py"
    own.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'own': 1})\n")
    with pytest.raises(PSAError, match=r"^tiny: a configuration of psa_jax, and tiny.py is here, too; ") as caught:
        read_config("tiny")
    ours, theirs = str(caught.value).partition("write ")[2].split(" or ")
    assert read_config(ours).model == "tiny"  # what it advises
    assert read_config(theirs).own == 1
    (tmp_path / "sd15").mkdir()
    (tmp_path / "sd21").write_text("")
    assert read_config("sd15").to_dict() == read_config(str(shipped()["sd15"])).to_dict()
    assert read_config("sd21").to_dict() == read_config(str(shipped()["sd21"])).to_dict()
    monkeypatch.chdir(pytestconfig.rootpath / "configs")  # here the two are one
    assert read_config("tiny").to_dict() == read_config("tiny.py").to_dict()


def test_help_of_all_begins_with_one_sentence(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    usage, what, rest = capsys.readouterr().out.split("\n\n", 2)
    assert what == "Personalized Safety Alignment for text-to-image diffusion in JAX."
    assert rest.startswith("positional arguments:")


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_help_names_the_shipped_configs(command, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert set(shipped()) <= set(re.findall(r"\w+", capsys.readouterr().out.partition("options:")[2]))


@pytest.mark.parametrize("command", ["generate", "export"])
def test_help_lists_what_a_profile_may_hold(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for said in ("age (0 to 100, required)", "gender (male, female; required)", "physical_condition (healthy, visual"):
        assert said in shown


def test_a_key_of_the_configuration_that_is_given_as_a_flag(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--config=tiny", f"--workdir={tmp_path / 'run'}", "--steps=3", "--stepz"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --steps=3 --stepz; did you mean --config.steps=3?" in capsys.readouterr().err
