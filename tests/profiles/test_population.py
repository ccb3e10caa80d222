"""The population equals the released users; users.csv is written privately and read strictly."""

import dataclasses
import stat

import pytest

from psa_jax.cli import main
from psa_jax.errors import PSAError
from psa_jax.profiles.population import read_users_csv, sample_population, write_users_csv
from psa_jax.profiles.schema import UserProfile

HEADER = "User_ID,Age,Age_Group,Gender,Religion,Physical_Condition,Mental_Condition"
ROW = "0000001,35,middle-aged,male,None,healthy,healthy"


def test_equals_the_released_users_byte_for_byte(shared_data, tmp_path):
    out = tmp_path / "users.csv"
    write_users_csv(out, sample_population(1000, 2025))
    lines = out.read_bytes().split(b"\n")
    ids, rest = zip(*(line.split(b",", 1) for line in lines[:-1]), strict=True)
    released = (shared_data / "users.csv").read_bytes().split(b"\n")
    assert list(rest) == released[:1001]
    assert lines[-1] == b"" and b"\r" not in out.read_bytes()
    assert list(ids) == [b"User_ID", *(b"%07d" % number for number in range(1, 1001))]


def test_bans_of_ones_own_are_a_column(tmp_path):
    usual = sample_population(3)
    own = [usual[0], dataclasses.replace(usual[1], bans=("Hate", "Violence")), usual[2]]
    write_users_csv(tmp_path / "users.csv", own)
    assert read_users_csv(tmp_path / "users.csv") == own
    assert ",Own_Bans,Banned_Categories," in (tmp_path / "users.csv").read_text().splitlines()[0]
    text = f"{HEADER},Own_Bans\n{ROW},Hate\n"
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(PSAError, match="line 2: Own_Bans is no list"):
        read_users_csv(tmp_path / "bad.csv")


def test_the_released_file_is_read_without_an_id_column(shared_data):
    users = read_users_csv(shared_data / "users.csv")
    assert len(users) == 1001
    assert users[:1000] == sample_population(1000)
    assert users[796] == UserProfile(
        "0000797", 35, "middle-aged", "male", "None", "hearing impairment", "major accidents"
    )


def test_the_first_users_are_known():
    first, second, *_ = sample_population(2)
    assert first == UserProfile("0000001", 18, "adolescents", "male", "Islam", "healthy", "healthy")
    assert second == UserProfile("0000002", 20, "young adults", "male", "Christianity", "healthy", "depression")


def test_prefix_and_seed():
    assert sample_population(20, seed=7) == sample_population(50, seed=7)[:20]
    assert sample_population(20, seed=7) != sample_population(20, seed=8)
    assert type(sample_population(1)[0].age) is int and type(sample_population(1)[0].gender) is str


@pytest.mark.parametrize(("count", "seed"), [(0, 1), (-1, 1), (10_000_000, 1), (1, -1), (1, 2**32)])
def test_counts_and_seeds_out_of_range(count, seed):
    with pytest.raises(PSAError, match="population: .* give"):
        sample_population(count, seed)


def test_round_trip_is_private_and_replaces_the_file(tmp_path):
    path = tmp_path / "users.csv"
    path.write_text("old")
    path.chmod(0o644)
    users = sample_population(30, seed=3)[::-1]
    write_users_csv(path, users)
    assert read_users_csv(path) == users
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["users.csv"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "users.csv"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(PSAError, match="No space left"):
        write_users_csv(path, sample_population(1))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["users.csv"]


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n", "\n,,,,,,\n", "\n  \n\n", ""])
def test_empty_lines_at_the_end_are_no_users(tmp_path, end):
    (tmp_path / "users.csv").write_bytes(f"\ufeff{HEADER}\n{ROW}{end}".encode())
    assert [user.user_id for user in read_users_csv(tmp_path / "users.csv")] == ["0000001"]


def test_writing_refuses_anonymous_and_repeated_users(tmp_path):
    user = sample_population(1)[0]
    with pytest.raises(PSAError, match="anonymous"):
        write_users_csv(tmp_path / "a.csv", [UserProfile.from_mapping({"age": 9, "gender": "male"})])
    with pytest.raises(PSAError, match="0000001 is given twice"):
        write_users_csv(tmp_path / "a.csv", [user, user])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no users"),
        (HEADER + "\n", "no users"),
        (HEADER.replace(",Gender", "") + "\n" + ROW, "missing .'Gender'"),
        (HEADER + ",Name\n" + ROW + ",x", "unknown is number 8 of 8"),
        (f"{HEADER},\n{ROW},x", "unknown is number 8 of 8"),
        (HEADER + ",Age\n" + ROW + ",35", "a column twice"),
        (f"{HEADER}\n{ROW},x\n", "line 2: 8 cells, but the header has 7"),
        (f"{HEADER}\n\n{ROW}\n", "line 2: 0 cells"),
        (f"{HEADER}\n{ROW}\n{ROW}\n", "line 3: user 0000001 is listed twice"),
        (f"{HEADER}\n{ROW.replace('None', '')}\n", 'line 2: .*religion.*the text "None"'),
        (f"{HEADER}\n{ROW.replace('35', '35.0')}\n", "line 2: .*age.*whole numbers"),
        (f"{HEADER}\n{ROW.replace('0000001', '1')}\n", "line 2: .*seven digits"),
        (f'{HEADER}\n{ROW[:-1]},"unclosed\n', "not a UTF-8 CSV"),
        (f"{HEADER},Banned_Categories\n{ROW},['Hate']\n", "line 2: Banned_Categories is not .*leave the column out"),
        (f"{HEADER},Banned_Categories\n{ROW},[\n", "line 2: Banned_Categories .*expected"),
        (f"{HEADER},Allowed_Categories\n{ROW},[]\n", "line 2: Allowed_Categories .*the ban rules give"),
        (f"{HEADER},Banned_Categories\n{ROW},__import__('os').abort()\n", "line 2: Banned_Categories .*expected"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "users.csv"
    path.write_text(text)
    with pytest.raises(PSAError, match=message) as caught:
        read_users_csv(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "SECRET,35,middle-aged,male,None,healthy,healthy\n" + ROW,  # no header: a user is in its place
        *(f"{HEADER}\n" + ROW.replace(cell, "SECRET" * 1000) for cell in ROW.split(",")[:6]),
        f"{HEADER},Banned_Categories\n{ROW},{'SECRET' * 1000}",
        f"{HEADER},Banned_Categories\n{ROW},\"['Shocking', 'Violence']\"",
    ],
)
def test_a_command_quotes_no_cell_of_a_users_csv(tmp_path, capsys, text):
    path = tmp_path / "users.csv"
    path.write_text(text)
    assert main(["encode", str(path), f"--out={tmp_path / 'table.safetensors'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"psa-jax: error: {path}") and error.count("\n") == 1
    told = error.removeprefix(f"psa-jax: error: {path}")
    assert len(told) < 400
    assert not [word for word in ("SECRET", "35", "'Shocking'") if word in told]


def test_missing_or_binary_files_are_refused(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PSAError, match="cannot be read"):
        read_users_csv(tmp_path / "none.csv")
    with pytest.raises(PSAError, match="not a UTF-8 CSV"):
        read_users_csv(tmp_path / "binary.csv")


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    path = tmp_path / "users.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\n{ROW}\r\n".encode())
    assert [user.user_id for user in read_users_csv(path)] == ["0000001"]
