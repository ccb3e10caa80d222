"""A build that is killed, shared among hosts or run again gives the bytes of an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_builder import assert_same_bytes

from psa_jax.data import build, sage
from psa_jax.data.shards import open_shards
from psa_jax.errors import PSAError

# Two batches a chunk: 12 calls of the encoder, 6 chunks. Killed by SIGKILL at the given call of the given function.
# One Python that forks for every build, as importing takes longer than building.
SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from support.small_sage import BUILD, CountingEncoder, tokenize
from psa_jax.data import build, builder

build._CHUNK_BATCHES = 2
functions = {{"encode": CountingEncoder(), "replace": os.replace, "row": builder._sorted_example,
             "rename": os.rename, "rmtree": shutil.rmtree}}


def run_build(killed_in, out):
    calls = dict.fromkeys(functions, 0)

    def counted(name):
        def call(*args, **kwargs):
            at_end = name == "rename" and Path(args[1]) == out or name == "rmtree" and Path(args[0]).suffix == ".parts"
            calls[name] += at_end if name in ("rename", "rmtree") else 1
            if [name, calls[name]] == killed_in:
                os.kill(os.getpid(), signal.SIGKILL)
            return functions[name](*args, **kwargs)
        return call

    os.replace, os.rename, shutil.rmtree = counted("replace"), counted("rename"), counted("rmtree")
    builder._sorted_example = counted("row")
    build.build_shards(Path(sys.argv[1]), out, encode=counted("encode"), tokenizer=tokenize, **BUILD)
    return calls["encode"]


results = []
for killed_in in json.loads(sys.argv[3]):
    if (child := os.fork()) == 0:
        os._exit(100 + run_build(killed_in, Path(sys.argv[2])))
    results.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(results))
"""


def forked_builds(sage_dir: Path, out: Path, killed_in: list) -> list[int]:
    """Exit code of each build: −9 when killed, else 100 + the calls of the encoder that it made."""
    script = SCRIPT.format(here=str(Path(__file__).parents[1]))
    run = subprocess.run(
        [sys.executable, "-c", script, sage_dir, out, json.dumps(killed_in)], capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


@pytest.fixture
def undisturbed(sage_dir: Path, tmp_path: Path, encode, build_options) -> Path:
    return build.build_shards(sage_dir, tmp_path / "undisturbed", encode=encode, **build_options)


def test_killed_at_any_moment_and_run_again(sage_dir: Path, tmp_path: Path, undisturbed: Path):
    """Before the first batch, in the middle, between writing a chunk and naming it, in TFDS, before and after the last
    step; at the end nothing is left to encode."""
    out = tmp_path / "out"
    moments = [["encode", 1], ["encode", 4], ["replace", 2], ["encode", 3], ["row", 30], ["rename", 1], ["rmtree", 1]]
    found = forked_builds(sage_dir, out, [*moments, None])
    assert found == [-9] * len(moments) + [100]
    assert not out.with_name("out.parts").exists()
    assert_same_bytes(undisturbed, out)


def test_what_is_encoded_is_not_encoded_again(sage_dir: Path, tmp_path: Path, undisturbed: Path):
    """Chunk 1 takes calls 1 and 2; it is written when call 4 has been started, since calls overlap."""
    assert forked_builds(sage_dir, tmp_path / "out", [["encode", 5], None]) == [-9, 100 + 12 - 2]
    assert_same_bytes(undisturbed, tmp_path / "out")


def test_parts_of_three_hosts(sage_dir: Path, tmp_path: Path, undisturbed: Path, encode, build_options, monkeypatch):
    monkeypatch.setattr(build, "_CHUNK_BATCHES", 1)  # 12 chunks
    out, calls = tmp_path / "out", []
    for host in range(3):
        before = len(encode.batches)
        folder = build.build_shards(sage_dir, out, encode=encode, **build_options, part=(host, 3))
        calls.append(len(encode.batches) - before)
        assert not out.exists() and folder == tmp_path / "out.parts"
        assert folder.stat().st_mode & 0o077 == 0
    assert calls == [4, 4, 4]
    before = len(encode.batches)
    build.build_shards(sage_dir, out, encode=encode, **build_options)
    assert len(encode.batches) == before
    assert_same_bytes(undisturbed, out)
    with pytest.raises(PSAError, match="part 3 of 3"):
        build.build_shards(sage_dir, tmp_path / "new", encode=encode, **build_options, part=(3, 3))


def test_a_changed_picture_is_encoded_again(sage_dir: Path, tmp_path: Path, encode, build_options, monkeypatch):
    monkeypatch.setattr(build, "_CHUNK_BATCHES", 1)
    build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options, part=(0, 1))
    record = sage.read_split(sage_dir, "train")[0]
    folder, before = sage_dir / "train", len(encode.batches)
    os.replace(folder / record.chosen, folder / "other")
    os.replace(folder / record.rejected, folder / record.chosen)
    os.replace(folder / "other", folder / record.rejected)
    build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    assert len(encode.batches) == before + 1  # the chunk of both
    assert_same_bytes(tmp_path / "out", build.build_shards(sage_dir, tmp_path / "2", encode=encode, **build_options))


def test_run_again_when_all_is_done(sage_dir: Path, undisturbed: Path, encode, build_options):
    before, names = len(encode.batches), sorted(path.name for path in undisturbed.iterdir())
    assert build.build_shards(sage_dir, undisturbed, encode=encode, **build_options) == undisturbed
    assert len(encode.batches) == before
    assert sorted(path.name for path in undisturbed.iterdir()) == names
    for change in ({"vae_fingerprint": "beef"}, {"flips": True}, {"batch_size": 7}, {"family": "other"}):
        with pytest.raises(PSAError, match="made otherwise"):
            build.build_shards(sage_dir, undisturbed, encode=encode, **(build_options | change))


def test_a_damaged_work_file_is_named(sage_dir: Path, tmp_path: Path, encode, build_options):
    folder = build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options, part=(0, 1))
    (chunk,) = folder.iterdir()
    chunk.write_bytes(chunk.read_bytes()[:-10])
    with pytest.raises(PSAError, match=f"{chunk.name}.*remove it and run again"):
        build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    chunk.unlink()
    build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    assert len(open_shards(tmp_path / "out", "train")) == 56
