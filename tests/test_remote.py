"""Buckets over real HTTP: what is copied is whole and of one version; what goes wrong is one line."""

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from psa_jax import remote
from psa_jax.errors import PSAError
from psa_jax.paths import Address, Source, address_or_none, local_path, path_or_address
from psa_jax.remote import Bucket, fetch, open_store


@pytest.fixture(params=["s3", "gs"])
def scheme(request) -> str:
    return request.param


def at(key: str, scheme: str = "s3") -> Address:
    return Address(scheme, "bucket", key)


def test_addresses():
    found = address_or_none("gs://some-bucket/a folder/b.safetensors/")
    assert found == Address("gs", "some-bucket", "a folder/b.safetensors") and found.name == "b.safetensors"
    assert str(found) == "gs://some-bucket/a folder/b.safetensors"
    assert address_or_none("gs:/x") is address_or_none("https://host/x") is address_or_none("/gs://b/x") is None
    assert path_or_address("here/x") == local_path("here/x")
    assert Source("s3", "b", "k") != Address("s3", "b", "k")  # only the first is copied


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3://id:secret@bucket/x", "s3://…: an address with credentials, a port or a query; "),
        ("s3://host:9000/x", "s3://…: an address with credentials, a port or a query; "),
        ("gs://bucket/x?X-Goog-Signature=secret", "gs://…: an address with credentials, a port or a query; "),
        ("gs:///x", "no such bucket can be"),
        ("gs://Bucket/x", "no such bucket can be"),
        ("gs://bucket", "a whole bucket; give a folder in it, such as gs://bucket/runs/own"),
        ("gs://bucket//", "a whole bucket"),
        ("gs://bucket/a//b", "the key must be a path of plain names"),
        ("gs://bucket/../b", "the key must be a path of plain names"),
        ("gs://bucket/a\\b", "the key must be a path of plain names"),
        ("gs://bucket/a\0b", "the key must be a path of plain names"),
        ("gs://bucket/a\udcff", "the key must be a path of plain names"),
    ],
)
def test_what_is_no_address(text: str, said: str):
    for read in (path_or_address, local_path):
        with pytest.raises(PSAError) as error:
            read(text)
        assert said in str(error.value) and "secret" not in str(error.value)


def test_other_protocols_do_not_repeat_a_password():
    with pytest.raises(PSAError, match="only paths on this machine can be used here") as error:
        local_path("ftp://me:secret@host/x?token=secret")
    assert "secret" not in str(error.value)


def test_a_file_and_a_folder_are_copied_once(server, scheme, capsys):
    big = bytes(range(256)) * 50_000  # more than the part that is put at once
    bucket = Bucket(at("data", scheme))
    bucket.put("one/weird *[?] ü.txt", b"weird")
    bucket.put("big", big)
    bucket.put("empty/", b"")
    assert server.objects["data/big"] == big
    folder = fetch(at("data", scheme))
    assert folder.name == "data" and (folder / "big").read_bytes() == big
    assert (folder / "one" / "weird *[?] ü.txt").read_bytes() == b"weird"
    assert stat.S_IMODE((folder / "big").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert fetch(at("data/big", scheme)).read_bytes() == big
    before = sum(method == "GET" and "prefix" not in path for method, path in server.requests)
    assert fetch(at("data", scheme)) == folder
    assert before == sum(method == "GET" and "prefix" not in path for method, path in server.requests)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"psa-jax: copying {scheme}://bucket/data to {folder.parent} (12.8 MB)"
    assert lines[-1] == f"psa-jax: {scheme}://bucket/data: its copy in {folder.parent} is used, of the same version"


def test_another_version_is_another_copy(server):
    server.objects["x/a"] = b"1"
    first = fetch(at("x"))
    server.objects["x/a"] = b"2"
    assert fetch(at("x")) != first and (fetch(at("x")) / "a").read_bytes() == b"2"
    assert (first / "a").read_bytes() == b"1"


def test_processes_of_a_machine_copy_once(server):
    server.objects |= {f"x/{index}": b"1" for index in range(20)}
    with ThreadPoolExecutor(4) as pool:  # each has a lock of its own, as processes have
        (place,) = set(pool.map(fetch, [at("x")] * 4))
    assert len(list(place.iterdir())) == 20
    assert sum(method == "GET" and "prefix" not in path for method, path in server.requests) == 20


def test_of_a_run_only_what_others_read(server):
    names = ["psa_adapter.safetensors", "config.json", "checkpoints/4/state/d/1", "tensorboard/events", "samples/1.png"]
    server.objects |= {f"run/{name}": b"1" for name in names}
    assert sorted(path.name for path in fetch(at("run")).iterdir()) == ["config.json", "psa_adapter.safetensors"]


def test_an_object_that_changes_while_it_is_copied(server, monkeypatch, tmp_path):
    server.objects |= {"x/a": b"1", "x/b": b"1"}
    listed = Bucket.objects

    def change(bucket):
        found = listed(bucket)
        server.objects["x/b"] = b"2"
        return found

    monkeypatch.setattr(Bucket, "objects", change)
    with pytest.raises(PSAError, match="s3://bucket/x: b changed while it was copied; run again"):
        fetch(at("x"))
    assert [path.suffix for path in (tmp_path / "cache" / "copies").iterdir()] == [".lock"]  # no half of it


def test_a_name_that_leads_out(server):
    server.objects["x/a\\..\\b"] = b"1"
    with pytest.raises(PSAError, match="which is no path of plain names; rename it"):
        fetch(at("x"))


def test_nothing_there_and_no_room(server, monkeypatch):
    with pytest.raises(PSAError, match="^s3://bucket/x: nothing is there; check the name$"):
        fetch(at("x"))
    server.objects["x"] = b"1"
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: remote.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(PSAError, match="make room, or set PSA_JAX_CACHE to a folder on another disk"):
        fetch(at("x"))


def test_a_bucket_that_refuses_is_not_there_or_does_not_answer(server, scheme, monkeypatch):
    address = at("x", scheme)
    server.refuses = {"PUT"}
    with pytest.raises(PSAError, match=f"^{address}: cannot be written: access is refused \\(403 Forbidden\\); "):
        Bucket(address).probe()
    server.refuses = {"GET", "HEAD"}
    with pytest.raises(PSAError, match=f"^{address}: cannot be read: access is refused \\(403 Forbidden\\); "):
        fetch(address)
    other = Address(scheme, "other", "x")
    for use, done in ((lambda: Bucket(other).probe(), "written"), (lambda: fetch(other), "read")):
        with pytest.raises(
            PSAError, match=f"^{other}: cannot be {done}: it is not there \\(404 Not Found\\); check bu"
        ):
            use()
    monkeypatch.setattr(remote, "_RETRIES", {"max_retries": 1})
    for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with pytest.raises(PSAError) as error:
        Bucket(address).probe()
    assert str(error.value) == (
        f"{address}: cannot be written (HTTP error: error sending request); check network and endpoint, and run again"
    )


def test_no_credentials(monkeypatch):
    """As on a machine outside of clouds, without keys in the environment."""
    from obstore.exceptions import GenericError

    text = f"Generic GCS error: Error performing token request: Error performing GET http://{remote._METADATA}/x?a=b"
    for said in (text, text.replace("token request", "PUT").replace("GCS", "S3")):
        with pytest.raises(PSAError) as error, remote.failures_named(at("x"), "read"):
            raise GenericError(f"{said} - Server returned non-2xx status code: 403 Forbidden: no\n\nDebug source")
        assert str(error.value) == (
            "s3://bucket/x: cannot be read: the environment has no credentials for it; "
            "docs/training.md says where credentials are looked for"
        )


def test_a_probe_leaves_nothing(server, scheme):
    Bucket(at("x", scheme)).probe()
    assert server.objects == {} and {"PUT", "POST" if scheme == "s3" else "DELETE"} <= {m for m, _ in server.requests}


def test_credentials_are_used_and_not_shown(server, capsys):
    server.objects["x"] = b"1"
    fetch(at("x"))
    assert all("Credential=an-id/" in line and "a-secret" not in line for line in server.authorization)
    server.refuses = {"GET", "HEAD"}
    with pytest.raises(PSAError) as error:
        fetch(at("x"))
    shown = capsys.readouterr().err + str(error.value)
    assert "an-id" not in shown and "a-secret" not in shown


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    with pytest.raises(PSAError, match=r"^s3://bucket/x: needs obstore; pip install 'psa_jax\[remote\]'$"):
        open_store(at("x"))
