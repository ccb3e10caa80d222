"""A working folder in a bucket: what is there is whole, at any moment; a run that goes on takes it from there."""

import json
from pathlib import Path

import pytest
from support.object_server import ObjectServer

from psa_jax import remote
from psa_jax.errors import PSAError, Stopped
from psa_jax.paths import Address
from psa_jax.training.mirror import MARKER, Mirror

PLACE = Address("s3", "bucket", "runs/own")


def write(folder: Path, name: str, content: str = "x") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def save(folder: Path, step: int) -> None:
    write(folder, f"checkpoints/{step}/about/metadata", f"about {step}")
    write(folder, f"checkpoints/{step}/state/d/1", f"state {step}")


def names(server: ObjectServer) -> set[str]:
    return {key.removeprefix("runs/own/") for key in server.objects}


def test_what_a_run_leaves_and_takes(server):
    with Mirror(PLACE) as mirror:
        write(mirror.folder, "metrics.jsonl", "1\n")
        write(mirror.folder, "tensorboard/events", "e")
        write(mirror.folder, "data/sage/1.png")
        write(mirror.folder, ".metrics.jsonl.12.tmp")
        write(mirror.folder, "checkpoints/4.orbax-checkpoint-tmp/state")
        save(mirror.folder, 2)
        mirror.push()
        first = {"metrics.jsonl", "tensorboard/events"} | {
            f"checkpoints/2/{name}" for name in ("about/metadata", "state/d/1", MARKER)
        }
        assert names(server) == first
        listed = json.loads(server.objects[f"runs/own/checkpoints/2/{MARKER}"])
        assert listed == {"files": {"checkpoints/2/about/metadata": 7, "checkpoints/2/state/d/1": 7}}
        before = len(server.requests)
        mirror.push()
        assert len(server.requests) == before  # nothing is new
    write(mirror.folder, "left", "of a run that the bucket does not know")
    with Mirror(PLACE) as again:
        found = {path.relative_to(again.folder).as_posix() for path in again.folder.rglob("*") if path.is_file()}
        assert found == first - {f"checkpoints/2/{MARKER}"}
        assert (again.folder / "checkpoints" / "2" / "state" / "d" / "1").read_text() == "state 2"
        before = [path for method, path in server.requests if method == "PUT"]
        again.push()
        assert before == [path for method, path in server.requests if method == "PUT"]


def test_checkpoints_that_the_run_no_longer_keeps(server):
    with Mirror(PLACE) as mirror:
        save(mirror.folder, 2)
        mirror.push()
        save(mirror.folder, 4)
        (mirror.folder / "checkpoints" / "2").rename(mirror.folder / "checkpoints" / "damaged_2")
        server.requests.clear()
        mirror.push()
        assert {name.split("/")[1] for name in names(server)} == {"4"}
    removed = [path for method, path in server.requests if method in ("POST", "DELETE")]
    put = [path for method, path in server.requests if method == "PUT"]
    assert put[-1].endswith(f"checkpoints/4/{MARKER}")  # the newer one is whole before the older one goes
    assert server.requests.index(("PUT", put[-1])) < min(server.requests.index(("POST", each)) for each in removed)


@pytest.mark.parametrize("puts", range(6))
def test_half_a_checkpoint_is_nobodys(server, puts):
    """The bucket takes so many objects of metrics and a checkpoint of two files and its marker, and no more."""
    with Mirror(PLACE) as mirror:
        write(mirror.folder, "metrics.jsonl", "1\n")
        save(mirror.folder, 2)
        mirror.push()
    with pytest.raises(PSAError, match="cannot be written: access is refused"), Mirror(PLACE) as mirror:
        write(mirror.folder, "metrics.jsonl", "1\n2\n")
        save(mirror.folder, 4)
        server.puts_left = puts
        mirror.push()
        raise PSAError("cannot be written: access is refused")  # it was all taken
    server.puts_left = None
    with Mirror(PLACE) as again:
        steps = {path.name for path in (again.folder / "checkpoints").iterdir()}
        assert steps == ({"2", "4"} if puts >= 4 else {"2"})
        assert puts < 4 or (again.folder / "metrics.jsonl").read_text() == "1\n2\n"
        whole = {name.split("/")[1] for name in names(server) if name.startswith("checkpoints/")}
        assert whole == steps  # of the half nothing is left


def test_a_marker_without_all_of_its_files(server):
    with Mirror(PLACE) as mirror:
        save(mirror.folder, 2)
    server.objects["runs/own/checkpoints/2/state/d/1"] = b"half"
    with Mirror(PLACE) as again:
        assert not (again.folder / "checkpoints").exists()
    assert names(server) == set()


@pytest.mark.parametrize("marker", [b"no JSON", b"{}", b"[]", b'{"files": 1}'])
def test_the_marker_of_somebody_else(server, marker):
    server.objects[f"runs/own/checkpoints/2/{MARKER}"] = marker
    with pytest.raises(PSAError, match="lists no files, .*; use another --workdir, or"), Mirror(PLACE):
        pytest.fail("it was entered")
    assert names(server) == {f"checkpoints/2/{MARKER}"}


def test_the_adapter_is_the_last_object(server):
    with Mirror(PLACE) as mirror:
        write(mirror.folder, remote.ADAPTER)
        write(mirror.folder, "zzz")
        save(mirror.folder, 9)
    assert [path for method, path in server.requests if method == "PUT"][-1] == f"/bucket/runs/own/{remote.ADAPTER}"


def test_a_run_that_fails_leaves_its_logs(server):
    with pytest.raises(Stopped, match="by a signal"), Mirror(PLACE) as mirror:
        write(mirror.folder, "nonfinite_2.json")
        raise Stopped("by a signal")
    assert names(server) == {"nonfinite_2.json"}
    with pytest.raises(RuntimeError), Mirror(PLACE) as mirror:
        write(mirror.folder, "more")
        raise RuntimeError
    assert names(server) == {"nonfinite_2.json"}


def test_two_runs_at_one_place(server):
    said = "another run on this machine writes there; wait for its end"
    with Mirror(PLACE), pytest.raises(PSAError, match=said), Mirror(PLACE):
        pytest.fail("it was entered")
    with Mirror(PLACE):
        pass


def test_a_bucket_that_refuses_is_said_first(server):
    server.refuses = {"PUT"}
    with pytest.raises(PSAError, match="^s3://bucket/runs/own: cannot be written: access is refused"), Mirror(PLACE):
        pytest.fail("it was entered")
