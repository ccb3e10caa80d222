"""Files appear completely or not at all, with the permissions that were asked for."""

import os
import stat
from pathlib import Path

import pytest

from psa_jax.errors import PSAError
from psa_jax.files import check_new, owner_only, read_bytes, replacing, replacing_folder, write, write_private


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_modes(tmp_path):
    write(tmp_path / "public", b"a")
    write(tmp_path / "private", b"b", mode=0o600)
    write_private(tmp_path / "thin", "c")
    with owner_only():
        write(tmp_path / "inside", b"d")
    write(tmp_path / "after", b"e")
    assert {path.name: mode_of(path) for path in tmp_path.iterdir()} == {
        "public": 0o644,
        "private": 0o600,
        "thin": 0o600,
        "inside": 0o600,
        "after": 0o644,
    }


def test_content(tmp_path):
    path = tmp_path / "a"
    write(path, "é\r\n")
    assert path.read_bytes() == read_bytes(str(path)) == b"\xc3\xa9\r\n"
    write(str(path), b"\x00\xff")
    assert read_bytes(path) == b"\x00\xff"
    assert names(tmp_path) == ["a"]


def test_a_private_file_replaces_a_public_one(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, b"new")
    assert (path.read_bytes(), mode_of(path)) == (b"new", 0o600)


def test_nobody_else_can_read_before_the_end(tmp_path):
    with replacing(tmp_path / "a", 0o600) as temporary:
        assert temporary.parent == tmp_path and mode_of(temporary) == 0o600
        assert not (tmp_path / "a").exists()
        temporary.write_bytes(b"x")
        assert mode_of(temporary) == 0o600
    assert names(tmp_path) == ["a"]


def test_a_library_that_writes_a_file_of_its_own(tmp_path):
    for mode, expected in ((0o666, 0o644), (0o600, 0o600)):
        with replacing(tmp_path / "a", mode) as temporary:
            own = tmp_path / "own"
            own.write_bytes(b"x")
            own.chmod(0o640)
            own.replace(temporary)
        assert mode_of(tmp_path / "a") == expected


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), PSAError("one line")])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("function", ["os.replace", "os.fsync", "pathlib.Path.write_bytes"])
def test_a_full_disk(tmp_path, monkeypatch, function):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(function, fail)
    for name in ("a", "b"):
        with pytest.raises(PSAError) as caught:
            write(tmp_path / name, b"new")
        path = tmp_path / name
        assert str(caught.value) == f"{path}: cannot be written (No space left on device); make room and run again"
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_link_is_replaced_and_what_it_points_at_is_not(tmp_path):
    (tmp_path / "far").write_text("old")
    (tmp_path / "a").symlink_to("far")
    write(tmp_path / "a", b"new")
    assert not (tmp_path / "a").is_symlink()
    assert [(tmp_path / name).read_text() for name in ("a", "far")] == ["new", "old"]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(PSAError, match=r"none/a: cannot .* .No such file.*choose a file in an existing folder$"):
        write(tmp_path / "none" / "a", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PSAError, match="folder: cannot be written .Is a directory"):
        write_private(tmp_path / "folder", b"x")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == []


def test_a_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()  # what a killed process left
    (tmp_path / ".out.partial" / "old").touch()
    out.mkdir()
    with replacing_folder(out) as unfinished:
        unfinished.mkdir(mode=0o700)
        (unfinished / "a").touch()
        assert names(out) == []
    assert (names(tmp_path), names(out), mode_of(out)) == (["out"], ["a"], 0o700)
    with pytest.raises(OSError, match="not empty"), replacing_folder(out) as unfinished:
        unfinished.mkdir()
    with pytest.raises(ValueError, match="no"), replacing_folder(tmp_path / "other") as unfinished:
        unfinished.mkdir()
        raise ValueError("no")
    assert (names(tmp_path), names(out)) == (["out"], ["a"])


def test_what_exists_is_refused(tmp_path):
    check_new(tmp_path / "a")
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(PSAError, match="link: exists already; give another name, or remove it first$"):
        check_new(tmp_path / "link")
    with pytest.raises(PSAError, match="exists already; use --out$"):
        check_new(tmp_path, "use --out")


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(PSAError, match="a: cannot be read .No such file.*check the path"):
        read_bytes(tmp_path / "a")
