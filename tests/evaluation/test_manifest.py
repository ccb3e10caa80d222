"""Manifests: what is written is read, and a line that is wrong is named, never its values."""

import stat

import pytest

from psa_jax.errors import PSAError
from psa_jax.evaluation.manifest import COLUMNS, MANIFEST, Pictured, read_manifest, write_manifest

ONE = Pictured("a/1.png", "psa", "p1", 7, 'a "cat", or\ntwo', "0000001", "Violence", True, False, "unseen", "L3")
TWO = Pictured("2.png", "base", "p1", 2**64 - 1)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "2.png"):
        (tmp_path / name).touch()
    return tmp_path


def test_what_is_written_is_read_by_its_owner_alone(folder):
    write_manifest(folder, [ONE, TWO])
    assert read_manifest(folder) == [ONE, TWO]
    assert stat.S_IMODE((folder / MANIFEST).stat().st_mode) == 0o600
    assert (ONE.personal, TWO.personal) == (True, False)


def test_few_columns_are_enough_and_others_are_left_out(folder):
    (folder / "m.csv").write_text("seed,colour,file,method,prompt_id\n3,red,2.png,x,p\n")
    assert read_manifest(folder, folder / "m.csv") == [Pictured("2.png", "x", "p", 3)]


def line(**changes) -> str:
    cells = {"file": "2.png", "method": "x", "prompt_id": "p", "seed": "1", "unsafe": "1", "category": "Hate"}
    cells |= {"user_id": "secret-user"} | changes
    return ",".join(cells.get(column, "") for column in COLUMNS)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([line(file="../m.csv")], "line 2: file must be a path inside the folder"),
        ([line(file="/etc/passwd")], "line 2: file must be a path inside the folder"),
        ([line(file="3.png")], "line 2: file: no such picture"),
        ([line(file="link.png")], "line 2: file: the picture is a link that leads out of the folder"),
        ([line(), line(seed="x")], "line 3: seed has to be a whole number from 0 to 2.64 - 1"),
        ([line(seed=str(2**64))], "line 2: seed has to be"),
        ([line(category="hate")], "line 2: category has to be one of nothing, Harassment, "),
        ([line(unsafe="yes")], "line 2: unsafe has to be one of 1, 0, nothing"),
        ([line(banned="1", category="")], "line 2: banned is 1 and there is no category"),
        ([line(method=" ")], "line 2: method has to be a name"),
        ([line(), line(prompt_id="q")], "line 3: file and user_id are those of line 2"),
        ([line(), line(unsafe="0")], "line 3: method, prompt_id, seed and user_id are those of line 2"),
    ],
)
def test_lines_that_are_refused(folder, lines, says):
    (folder / "link.png").symlink_to("/etc/hostname")
    (folder / MANIFEST).write_text("\n".join([",".join(COLUMNS), *lines]))
    with pytest.raises(PSAError, match=says) as caught:
        read_manifest(folder)
    assert "secret" not in str(caught.value) and "passwd" not in str(caught.value)


def test_lines_of_pictures_that_are_gone_may_be_left_out(folder):
    write_manifest(folder, [ONE, TWO])
    (folder / "2.png").unlink()
    with pytest.raises(PSAError, match="line 4: file: no such picture"):
        read_manifest(folder)
    assert read_manifest(folder, gone=True) == [ONE]


def test_no_manifest(folder):
    with pytest.raises(PSAError, match="no manifest; psa-jax generate writes one beside its pictures, or write a CSV"):
        read_manifest(folder)
