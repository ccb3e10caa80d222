"""`psa-jax aot` says what programs take and cost on TPUs that are not here, and tiny ones stay within a budget."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest
from support.shape_folders import shape_folder

import psa_jax
from psa_jax.cli import main
from psa_jax.tools import aot as tool
from psa_jax.training import diagnosis, lowered
from psa_jax.training.aot import DEAREST, Measured, summary
from psa_jax.training.chips import CHIPS, GIB, chip_of, of_first_host
from psa_jax.training.compiled_cost import KINDS, Cost, Row
from psa_jax.training.lowered import bytes_needed
from psa_jax.training.programs import Work

ROOT = Path(psa_jax.__file__).resolve().parents[1]
AOT = ["aot", "--config=tiny:dpo"]


def row(name: str, cycles: int, **about) -> Row:
    plain = {"times": 1, "flops": 0, "useful": 0, "padded": 0, "kind": "other", "phase": "forward"}
    plain |= {"scope": "unet", "source": "models/unet.py:9"}
    return Row(name=name, cycles=cycles, **(plain | about))


COST = Cost(
    (
        row("a", 1_500_000, kind="norm"),
        row("b", 750_000, kind="dense", flops=197_000_000, useful=98_500_000, phase="backward"),
        row("c", 0, kind="attention", flops=10, useful=10, padded=98_500_000_000),
    ),
    {"all-reduce": (2, 100)},
    (),
    (),
)
"""1.5 ms at 1.5 GHz, and a kernel of 1 ms at half of v5e's peak."""
HBM = {"arguments": GIB, "outputs": 0, "temporaries": 2 * GIB, "program": GIB // 4}


def work(**about) -> Work:
    plain = {
        "lower": lambda pairs: {},
        "calls": {"train": 1},
        "chips": 4,
        "batch_size": 8,
        "least": 4,
        "items": "pairs",
    }
    return Work(**(plain | about))


@pytest.fixture
def slices(monkeypatch):
    """The slice's devices are the CPU's, and no libtpu is needed."""
    monkeypatch.setattr(tool, "topology_devices", lambda name, slices: jax.devices()[:4])
    monkeypatch.setattr(tool, "version", lambda name: "1.2.3")


def error(capsys, *words: str) -> str:
    assert main([*AOT, *words]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("psa-jax: error: ")]
    return line


# --- what does not go


def test_without_libtpu(capsys, monkeypatch):
    monkeypatch.setattr(lowered.importlib.util, "find_spec", lambda name: None)
    assert "takes libtpu, whose compiler needs no TPU; pip install 'psa_jax[tpu]'" in error(
        capsys, "--topology=v5e:2x2"
    )


def test_libtpu_of_another_jax(capsys, monkeypatch):
    monkeypatch.setattr(lowered.importlib.util, "find_spec", lambda name: name)
    of = diagnosis.version
    monkeypatch.setattr(diagnosis, "version", lambda name: "0.0.1" if name == "libtpu" else of(name))
    said = error(capsys, "--topology=v5e:2x2")
    assert "libtpu is 0.0.1; pip install 'libtpu==" in said


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:4", "v5e:2x2x2", "v5p:2x2", "v4:2x2x1", "h100:2x2", "v5e:2x-2", "V5E:2x2"]
)
def test_no_slice_of_a_known_chip(capsys, name):
    said = error(capsys, f"--topology={name}")
    assert f"topology {name!r} is no slice whose cost is known; give v5e or v6e with two sides, such as v5e:4x4" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch-size=6"], "batch_size = 6 cannot be divided into accumulate = 1 parts on 4 devices"),
        (["--batch-size=6", "--what=build"], "batch size 6 cannot be divided among 4 devices; use a multiple"),
        (["--what=reference"], "reference.draws is 0, and a training without stored draws has no reference pass"),
        (["--largest", "--batch-size=8"], "--largest looks for a batch size, and --batch-size gives one"),
        (["--config.batch_size=0"], "batch_size is 0; give a whole number"),
        (["--config.mesh.data=5"], "mesh.data = 5, mesh.fsdp = 1: there are 4 devices"),
        (["--config.model=absent"], "model is absent, which is not there; give a base model's folder or file, or tiny"),
    ],
)
def test_what_does_not_go(slices, capsys, words, said):
    assert said in error(capsys, "--topology=v5e:2x2", "--config.mesh.data=-1", *words)


def test_a_result_is_never_written_over(slices, capsys, tmp_path):
    (tmp_path / "old.json").write_text("{}")
    assert "old.json" in error(capsys, "--topology=v5e:2x2", f"--json={tmp_path / 'old.json'}")


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        (
            "Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded hbm capacity by 7.75G.",
            23.5 * GIB,
        ),
        ("the total memory required for HLO temporaries (512.00G) exceeds available HBM (15.75G).", 512 * GIB),
        ("Used 900.5M of 15.75G hbm", 900.5 * GIB / 1024),
        ("Ran out of memory in memory space vmem. Used 130.0M of 128.0M vmem.", None),
        ("INTERNAL: something else", None),
    ],
)
def test_what_the_compiler_says_of_memory(said, needed):
    assert bytes_needed(jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")) == needed


# --- what is said


def test_chips():
    """Peaks are clocks times the FLOP of all matrix units in a cycle, to a percent."""
    cycle = {"v5e": 4 * 128 * 128 * 2, "v5p": 2 * 4 * 128 * 128 * 2, "v6e": 2 * 2 * 256 * 256 * 2}
    for name, chip in CHIPS.items():
        assert chip.peak / cycle[name] == pytest.approx(chip.clock, rel=0.01)
        assert 0.95 * chip.hbm < chip.usable < chip.hbm
        assert chip_of(f"{name}:2x2{'x1' * (chip.sides - 2)}") is chip
    assert of_first_host(jax.devices()) == jax.devices()


def test_the_numbers_of_a_step():
    found = summary(work(), 8, {"train": Measured(HBM, COST, 12.34)}, CHIPS["v5e"])
    assert (found["hbm_bytes"], found["hbm_limit_bytes"]) == (3.25 * GIB, 15.75 * GIB)
    assert found["fits"] and found["hbm_free_bytes"] == 12.5 * GIB
    assert (found["chips"], found["batch_size"], found["batch_per_chip"]) == (4, 8, 2.0)
    assert found["step_ms"] == pytest.approx(2.5) and found["kernel_ms"] == pytest.approx(1.0)
    assert found["mfu"] == pytest.approx((98_500_000 + 10) / (2.5e-3 * 197e12))
    assert found["pairs_per_hour"] == pytest.approx(3600 * 8 / 2.5e-3)
    assert (found["flops"], found["useful_flops"]) == (197_000_010, 98_500_010)
    assert found["by_kind"] == dict.fromkeys(KINDS, 0) | {"norm": 1_500_000, "dense": 750_000}
    assert found["by_phase"] == {"forward": 1_500_000, "backward": 750_000}
    assert found["kernels"] == {"forward": pytest.approx(1.0)}
    assert (found["collective_bytes"], found["collectives"]) == (100, {"all-reduce": {"runs": 2, "bytes": 100}})
    assert [each["name"] for each in found["dearest"]] == ["a", "c", "b"]
    assert found["compile_seconds"] == 12.3


def test_a_program_that_runs_twice_in_a_batch():
    both = work(calls={"vae": 2, "text_encoder": 1})
    smaller = Measured(HBM | {"arguments": 0}, COST, 1.0)
    found = summary(both, 8, {"vae": Measured(HBM, COST, 1.0), "text_encoder": smaller}, CHIPS["v5e"])
    assert found["step_ms"] == pytest.approx(7.5) and found["cycles"] == 3 * 2_250_000
    assert (found["hbm_bytes"], found["collective_bytes"]) == (3.25 * GIB, 300)


def test_what_is_printed(slices, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tool, "measure", lambda work, size, quick: {"train": Measured(HBM, COST, 12.34)})
    out = tmp_path / "step.json"
    assert main([*AOT, "--topology=v5e:2x2", "--config.mesh.data=-1", f"--json={out}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found == json.loads(out.read_text())
    assert {"topology", "chips", "hbm_bytes", "hbm_limit_bytes", "fits", "flops", "step_ms", "kernel_ms"} <= set(found)
    assert {"mfu", "collective_bytes", "compile_seconds", "by_kind", "by_scope", "hours"} <= set(found)
    assert found["hours"] == pytest.approx(540 * 2.5e-3 / 3600)
    text = "\n".join(lines)
    assert text.startswith("train on 4 of the 4 chips of v5e:2x2, batch of 16 pairs, float32\n")
    assert "memory of a chip, GiB: 3.25 of 15.75 (arguments 1.00, outputs 0.00, temporaries 2.00, program 0.25)" in text
    assert "fits, 12.50 free" in text and "MFU 0.0 %" in text
    assert "a chip, 9.85e+07 without what is computed again" in text
    assert "collectives, bytes of a chip: all-reduce 2 x, 100" in text
    assert "models/unet.py:9  a" in text


def too_large(pairs: int) -> Measured:
    """3 GiB a pair of each of four chips; a step that does not fit has no costs."""
    needed = pairs // 4 * 3 * GIB
    return Measured({"total": needed}, COST if needed < 15.75 * GIB else None, 1.0)


def test_the_least_effort_has_no_times(slices, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        tool, "measure", lambda *given, quick: asked.append(quick) or {"train": Measured(HBM, COST, 1.0)}
    )
    assert main([*AOT, "--topology=v5e:2x2", "--config.mesh.data=-1", "--quick"]) == 0 and asked == [True]
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert (found["flops"], found["collective_bytes"], found["hbm_bytes"]) == (197_000_010, 100, 3.25 * GIB)
    assert not {"step_ms", "mfu", "cycles", "by_kind", "pairs_per_hour", "hours"} & set(found)
    assert lines[1].endswith("fits, 12.50 free") and "collectives, bytes of a chip: all-reduce 2 x, 100" in lines
    assert not any("estimated" in line for line in lines[:-1])


def test_a_step_that_does_not_fit(slices, capsys, monkeypatch):
    monkeypatch.setattr(tool, "measure", lambda work, size, quick: {"train": too_large(size)})
    words = [*AOT, "--topology=v5e:2x2", "--config.mesh.data=-1"]
    assert main([*words, "--batch-size=24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "18.00 of 15.75 (total 18.00): does NOT fit, 2.25 too many" in lines[1]
    found = json.loads(lines[-1])
    assert (found["fits"], found["hbm_free_bytes"]) == (False, -2.25 * GIB) and "step_ms" not in found


def test_what_the_least_effort_compiles_although_it_is_too_large(slices, capsys, monkeypatch):
    """Told with its costs, and as what it is."""
    large = Measured(HBM | {"temporaries": 15 * GIB}, COST, 1.0)
    monkeypatch.setattr(tool, "measure", lambda work, size, quick: {"train": large})
    assert main([*AOT, "--topology=v5e:2x2", "--config.mesh.data=-1", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("does NOT fit, 0.50 too many")
    found = json.loads(lines[-1])
    assert (found["fits"], found["flops"]) == (False, 197_000_010)


def test_the_largest_batch(slices, capsys, monkeypatch):
    monkeypatch.setattr(tool, "measure", lambda work, size, quick: {"train": too_large(size)})
    words = [*AOT, "--topology=v5e:2x2", "--config.mesh.data=-1", "--largest"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["largest_batch_per_chip"], found["batch_size"], found["compiled"]) == (5.0, 20, 6)
    monkeypatch.setattr(tool, "measure", lambda work, size, quick: {"train": too_large(100 * size)})
    assert "takes 300.00 GiB of a chip's 15.75; set remat to full" in error(capsys, *words[2:])


# --- the compiler itself

BUDGET = {
    "0.0.42.1": {
        "train": {"attention": 688_131, "convolution": 205_324, "dense": 574_164, "norm": 2_318_626, "other": 335_169},
        "generate": {
            "attention": 3_605_299,
            "convolution": 1_778_467,
            "dense": 3_090_102,
            "norm": 21_078_491,
            "other": 2_549_414,
        },
    }
}
"""libtpu -> cycles on v5e of the tiny model's training step of 16 pairs, and of 8 pictures in 20 steps with guidance.

Recorded by `psa-jax aot --config=tiny --topology=v5e:2x2 --what=…`. The estimates do not depend on the machine. Who
makes a step dearer on purpose records it anew and says why. Norms in one pass are dearer at this size, in float32 on
16 × 16 pixels, and cheaper at that of Stable Diffusion (tests/benchmarks/NOTES.md). Both parts of guidance share what
is in front of the first cross-attention: a twentieth of the FLOP here, for copies that take as long (`other`).
"""


def over(found: dict[str, int], budget: dict[str, int]) -> list[str]:
    """Kinds that take a tenth more cycles than their budget, and `all` if all together do."""
    kinds = [kind for kind, most in budget.items() if found[kind] > 1.1 * most]
    return kinds + ["all"] * (sum(found.values()) > 1.1 * sum(budget.values()))


def test_a_dearer_step_is_found():
    budget = BUDGET["0.0.42.1"]["train"]
    assert over(budget, budget) == []
    assert over(budget | {"dense": 631_581}, budget) == ["dense"]  # 10.0001 % more
    assert over(budget | {"dense": 631_580}, budget) == []
    assert over({kind: cycles * 111 // 100 for kind, cycles in budget.items()}, budget) == [*budget, "all"]


COMPILER = pytest.mark.tpu_compiler
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'psa_jax[tpu]'"
)


def compiled(folder: Path, *words: str, config: str = "tiny", topology: str = "v5e:2x2") -> dict:
    """In a process of its own: tests compile for the CPU with flags that would reach this compiler, too."""
    out = folder / "found.json"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": path}
    words = ["aot", f"--config={config}", f"--topology={topology}", f"--json={out}", *words]
    done = subprocess.run(
        [sys.executable, "-m", "psa_jax", *words], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@COMPILER
@pytest.mark.timeout(1800)
@NEEDS_LIBTPU
@pytest.mark.parametrize("what", ["train", "generate"])
def test_the_tiny_model_on_v5e(what, tmp_path):
    found = compiled(tmp_path, f"--what={what}")
    assert found["fits"] and 0 < found["hbm_bytes"] < 0.01 * found["hbm_limit_bytes"]
    assert found["unknown_loops"] == found["unknown_kernels"] == []
    assert 0 < found["mfu"] < 1 and found["step_ms"] == pytest.approx(found["cycles"] / 1.5e6)
    assert len(found["dearest"]) == DEAREST and any(each["source"] for each in found["dearest"])
    phases = {"train": {"forward", "backward", "reference", "optimizer"}, "generate": {"unet", "vae_decode"}}
    assert phases[what] <= set(found["by_phase"])
    installed = metadata.version("libtpu")
    if installed not in BUDGET:
        pytest.skip(f"compiles; no cycles are recorded for libtpu {installed}, only for {', '.join(BUDGET)}")
    assert over(found["by_kind"], BUDGET[installed][what]) == []


@COMPILER
@pytest.mark.timeout(1800)
@NEEDS_LIBTPU
def test_the_least_effort_of_the_compiler(tmp_path):
    found = compiled(tmp_path, "--quick", "--config.mesh.data=-1")
    assert found["fits"] and 0 < found["hbm_bytes"] < 0.02 * found["hbm_limit_bytes"]
    assert found["chips"] == 4 and set(found["collectives"]) == {"all-reduce"}
    assert 1e9 < found["flops"] == found["useful_flops"] and "step_ms" not in found


@pytest.mark.slow
@COMPILER
@pytest.mark.timeout(7200)
@NEEDS_LIBTPU
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_slice_that_a_configuration_names(name, tmp_path):
    """Its default step fits the slice in its docstring, at full size; what its chips send is the gradient."""
    topology, chips = re.search(
        r"Sized for (v\w+:[\dx]+), (\d+) chips", (ROOT / f"configs/{name}.py").read_text()
    ).groups()
    model = f"--config.model={shape_folder(name, tmp_path / name)}"
    found = compiled(tmp_path, model, "--quick", config=f"configs/{name}.py", topology=topology)
    print(f"\n{name} on {topology}: {found['hbm_bytes'] / GIB:.2f} GiB, {found['batch_per_chip']} pairs a chip")
    assert found["fits"] and found["chips"] == int(chips)
    assert found["unknown_loops"] == found["unknown_kernels"] == []
    assert set(found["collectives"]) == {"all-reduce"}
