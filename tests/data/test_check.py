"""`check` finds every kind of damage at its line, says so without a word of any profile, and calls sound data sound."""

import csv
import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.standin import write_standin

from psa_jax.data import sage
from psa_jax.data.check import CHECKS, Report, check_sage, quarantine
from psa_jax.data.rows import PROMPT_KINDS
from psa_jax.errors import PSAError
from psa_jax.profiles.population import sample_population, write_users_csv
from psa_jax.profiles.schema import UserProfile
from psa_jax.tools import check as command

SPLITS = ("train", "val", "test_seen", "test_unseen")
# Words that only a profile has; the rules of a field may list them all, but no finding about a user may hold one.
RELEASED = sample_population(1000)
VALUES = ("Islam", "Christianity", "Buddhism", "male", "adult", "adolescent", "children", "toddler", "healthy", "war")


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """6 train users and one of each other split, 378 rows; read only."""
    root = tmp_path_factory.mktemp("standin") / "sage"
    write_standin(root, users=6, size=16)
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """The same to be damaged: pictures are links, so replace them and never write into them."""
    shutil.copytree(sound, tmp_path / "sage", copy_function=os.link)
    for split in SPLITS:
        path = tmp_path / "sage" / split / "metadata.jsonl"
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    return tmp_path / "sage"


def lines_of(root: Path, split: str = "train") -> list[bytes]:
    return (root / split / "metadata.jsonl").read_bytes().splitlines()


def write_lines(root: Path, lines: list[bytes], split: str = "train") -> None:
    (root / split / "metadata.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


def row_of(root: Path, line: int, split: str = "train") -> dict:
    return json.loads(lines_of(root, split)[line - 1])


def set_line(root: Path, line: int, content: bytes | dict, split: str = "train") -> None:
    lines = lines_of(root, split)
    lines[line - 1] = content if isinstance(content, bytes) else json.dumps(content).encode()
    write_lines(root, lines, split)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def picture(format: str = "JPEG", size: tuple[int, int] = (16, 16)) -> bytes:
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, format=format)
    return content.getvalue()


def check(root: Path, images: bool = False, users: list[UserProfile] = RELEASED) -> Report:
    return check_sage(root, users=users, images=images, processes=1)


def found(report: Report) -> dict[tuple[str, int], set[str]]:
    return {(row.split, row.line): {problem.check for problem in row.problems} for row in report.bad}


def test_a_sound_folder_is_sound(sound: Path):
    report = check_sage(sound, processes=1)
    assert report.ok and report.bad == () and quarantine(report) == b""
    assert (report.pictures, report.decoded, report.absent) == (378, 378, ())
    assert set(report.by_check.values()) == {0} and tuple(report.by_check) == CHECKS
    # 3 concepts of each category a user, each once under either kind of prompt
    assert len(report.rows) == 4 * 7 * 2
    assert {count for (split, _, _), count in report.rows.items() if split == "train"} == {6 * 3}
    assert {count for (split, _, _), count in report.rows.items() if split != "train"} == {3}
    mapping = report.to_mapping()
    assert mapping["ok"] and (mapping["rows"], mapping["bad"]) == (378, 0)
    assert mapping["splits"]["val"]["categories"]["Self-Harm"] == {s: {"rows": 3, "bad": 0} for s in ("unsafe", "safe")}
    assert [len(sage.read_split(sound, split)) for split in SPLITS] == [252, 42, 42, 42]


# --- damage to one row of train: what is done to it, and the check that finds it


def changed(field: str, value: object) -> Callable[[Path, dict], bytes]:
    return lambda root, row: json.dumps(row | {field: value}).encode()


def user_changed(field: str, value: object) -> Callable[[Path, dict], bytes]:
    return lambda root, row: json.dumps(row | {"user_data": row["user_data"] | {field: value}}).encode()


def without(field: str) -> Callable[[Path, dict], bytes]:
    return lambda root, row: json.dumps({key: value for key, value in row.items() if key != field}).encode()


def renamed(old: str, new: str) -> Callable[[Path, dict], bytes]:
    return lambda root, row: json.dumps(row).replace(old, new).encode()


def swapped(root: Path, row: dict) -> bytes:
    return json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}).encode()


ROW_DAMAGE = {
    "broken JSON": (lambda root, row: json.dumps(row).encode()[:-3], "json"),
    "an empty line": (lambda root, row: b"", "json"),
    "not UTF-8": (lambda root, row: b'{"caption": "\xff"}', "json"),
    "not finite": (lambda root, row: json.dumps(row | {"caption": float("nan")}).encode(), "json"),
    "a field missing": (without("caption"), "schema"),
    "a field too many": (changed("label", 1), "schema"),
    "a wrong type": (changed("caption", 7), "schema"),
    "a profile as text": (changed("user_data", "sesame"), "schema"),
    "an empty caption": (changed("caption", " "), "values"),
    "nan religion": (user_changed("Religion", "nan"), "values"),
    "no religion": (user_changed("Religion", None), "values"),
    "an age as text": (user_changed("Age", "18"), "values"),
    "the wrong age group": (user_changed("Age_Group", "elderly"), "values"),
    "a cluster as number": (user_changed("Cluster_ID", 13), "values"),
    "an id with letters": (renamed("0000001", "00000o1"), "names"),
    "another user's id": (user_changed("User_ID", "0000003"), "names"),
    "an unknown category": (renamed("_propaganda_", "_gossip_"), "names"),
    "a path upwards": (changed("chosen", "../../../etc/passwd"), "names"),
    "an absolute path": (changed("rejected", "/etc/passwd"), "names"),
    "a file name upwards": (changed("file_name", "user_0000001_hate_../x_00001.jpg_u.jpg"), "names"),
    "a pair of one": (lambda root, row: json.dumps(row | {"rejected": row["chosen"]}).encode(), "names"),
    "the label": (swapped, "label"),
    "the profile": (user_changed("Age", 19), "population"),  # the user is 18 years old
    "the cluster": (user_changed("Cluster_ID", "39"), "population"),
}


@pytest.mark.parametrize("damage", ROW_DAMAGE)
def test_damage_to_a_row(root: Path, damage: str):
    damaged, failing = ROW_DAMAGE[damage]
    row = row_of(root, 5)
    assert row["user_data"]["User_ID"] == "0000001" and "_propaganda_" in row["file_name"]
    set_line(root, 5, damaged(root, row))
    report = check(root)
    assert found(report) == {("train", 5): {failing}}
    assert (sum(report.rows.values()), report.by_check[failing], report.decoded) == (378, 1, 0)
    (stored,) = map(json.loads, quarantine(report).splitlines())
    assert (stored["file"], stored["line"], stored["checks"]) == ("train/metadata.jsonl", 5, [failing])
    assert stored["reason"] and "\n" not in stored["reason"]
    if failing != "values":  # there the rule of the field is told, which lists them all
        assert not [word for word in VALUES if word in stored["reason"]]
    # What is quarantined is what the builder's reader refuses; the rest is sound.
    if failing != "population":
        with pytest.raises(PSAError, match="line 5: "):
            sage.read_split(root, "train")
    lines = lines_of(root)
    write_lines(root, lines[:4] + lines[5:])
    assert check(root).ok


# --- damage to one picture: both rows of its pair are bad


def huge_png() -> bytes:
    """50,000 x 50,000 pixels: 7.5 GB if it were decoded."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def link_out(path: Path) -> None:
    outside = path.parents[2] / "outside.jpg"
    os.link(path, outside)
    path.unlink()
    path.symlink_to(outside)


PICTURE_DAMAGE = {
    "missing": (Path.unlink, "is missing", False),
    "a link out of the folder": (link_out, "leads out", False),
    "zero bytes": (lambda path: replace(path, b""), "0 bytes", True),
    "a cut JPEG": (lambda path: replace(path, picture()[:-50]), "the end of the JPEG is missing", True),
    "a GIF": (lambda path: replace(path, picture("GIF")), "neither JPEG nor PNG", True),
    "a huge PNG": (lambda path: replace(path, huge_png()), "pixels", True),
    "another size": (lambda path: replace(path, picture(size=(16, 17))), "differ in size", True),
}


@pytest.mark.parametrize("damage", PICTURE_DAMAGE)
def test_damage_to_a_picture(root: Path, damage: str):
    harm, says, only_when_opened = PICTURE_DAMAGE[damage]
    harm(root / "train" / row_of(root, 5)["chosen"])
    report = check(root, images=True)
    assert found(report) == {("train", 5): {"pictures"}, ("train", 6): {"pictures"}}
    for row in report.bad:
        assert says in row.reason and str(root) not in row.reason
    assert check(root).ok == only_when_opened


# --- what rows tell of each other


def test_a_row_given_twice(root: Path):
    write_lines(root, [*lines_of(root), lines_of(root)[4]])
    report = check(root)
    assert found(report) == {("train", 253): {"duplicates"}}
    assert report.bad[0].reason.endswith("is on line 5 too; keep one")


def copy_pair(root: Path, source: str, target: str) -> None:
    """The first two rows of `source`, a pair, with their pictures, to the end of `target`."""
    pair = lines_of(root, source)[:2]
    write_lines(root, lines_of(root, target) + pair, target)
    row = json.loads(pair[0])
    for name in (row["chosen"], row["rejected"]):
        os.link(root / source / name, root / target / name)


@pytest.mark.parametrize(
    ("source", "target", "checks", "says"),
    [
        ("train", "val", {"users"}, "is in train too"),
        ("train", "test_unseen", {"users", "prompts"}, "is in train too"),
        ("val", "test_unseen", {"users", "prompts"}, "is in val too"),
        ("test_unseen", "test_seen", {"users"}, "is not in train"),
        ("val", "test_seen", {"users", "prompts"}, "is not in train"),
    ],
)
def test_users_and_prompts_that_leak(root: Path, source: str, target: str, checks: set[str], says: str):
    copy_pair(root, source, target)
    report = check(root)
    assert found(report) == {(target, 43): checks, (target, 44): checks}
    assert all(says in row.reason for row in report.bad)


def test_a_prompt_leaks_in_other_spelling(root: Path):
    caption = row_of(root, 3)["caption"]
    set_line(root, 9, row_of(root, 9, "test_seen") | {"caption": f"  {caption.upper()}\t"}, "test_seen")
    report = check(root)
    assert found(report) == {("test_seen", 9): {"prompts"}}
    assert "train/metadata.jsonl, line 3" in report.bad[0].reason and "garden" not in report.bad[0].reason


def test_val_may_share_prompts_with_train(root: Path):
    """As in the release; it is counted, not refused."""
    before = check(root).shared_prompts
    shared = {json.loads(line)["caption"].casefold() for line in lines_of(root)}
    assert before == sum(json.loads(line)["caption"].casefold() in shared for line in lines_of(root, "val"))
    new = next(line for line in range(1, 43) if row_of(root, line, "val")["caption"].casefold() not in shared)
    set_line(root, new, row_of(root, new, "val") | {"caption": row_of(root, 3)["caption"]}, "val")
    report = check(root)
    assert report.ok and report.shared_prompts == before + 1


def test_another_population(root: Path):
    """Users that are not the released ones: all rows are bad, unless their population is given."""
    report = check(root, users=sample_population(1000, seed=1))
    assert report.by_check["population"] == len(report.bad) > 300
    assert check(root, users=RELEASED).ok
    # Nothing to compare with: the user's rows must agree, and the odd one out is bad.
    others = RELEASED[500:501]
    assert check(root, users=others).ok
    set_line(root, 1, json.loads(user_changed("Age", 19)(root, row_of(root, 1))))
    report = check(root, users=others)
    assert found(report) == {("train", 1): {"population"}}
    assert report.bad[0].reason == "user 0000001: Age not as in the user's other rows"


def test_all_that_is_wrong_with_a_row_is_said(root: Path):
    row = row_of(root, 5)
    set_line(root, 5, json.loads(swapped(root, row)) | {"user_data": row["user_data"] | {"Age": 19}})
    (root / "train" / row["chosen"]).unlink()
    replace(root / "train" / row["rejected"], b"")
    report = check(root, images=True)
    assert found(report) == {("train", 5): {"label", "pictures", "population"}, ("train", 6): {"pictures"}}
    assert [len(bad.problems) for bad in report.bad] == [4, 2]  # one picture is missing, the other is empty
    assert report.to_mapping()["splits"]["train"]["bad"] == 2 and report.by_check["pictures"] == 2


def test_absent_and_broken_splits(root: Path, tmp_path: Path):
    shutil.rmtree(root / "val")
    report = check(root)
    assert report.ok and report.absent == ("val",) and sum(report.rows.values()) == 336
    (root / "val").symlink_to("nowhere")
    with pytest.raises(PSAError, match="val: no such folder"):
        check(root)
    (root / "val").unlink()
    (root / "test_seen" / "metadata.jsonl").write_bytes(b"")
    with pytest.raises(PSAError, match="test_seen.* no rows in it"):
        check(root)
    with pytest.raises(PSAError, match="none of the folders"):
        check(tmp_path)


# --- the command


def arguments(sage_dir: Path, **changes: object) -> Namespace:
    values = {"sage_dir": sage_dir, "json": None, "quarantine": None, "users": None, "processes": 1, "images": True}
    return Namespace(**values | changes)


def test_the_command_on_sound_data(root: Path, tmp_path: Path, capsys):
    write_users_csv(tmp_path / "users.csv", RELEASED)
    assert command.run(arguments(root, users=tmp_path / "users.csv")) == 0
    *table, last = capsys.readouterr().out.splitlines()
    answer = json.loads(last)
    assert answer["ok"] and (answer["rows"], answer["bad"], answer["decoded"]) == (378, 0, 378)
    assert (root / "quarantine.jsonl").read_bytes() == b""
    assert table[1].split() == ["train", "Harassment", "18", "0", "18", "0"]
    assert table[28].split() == ["test_unseen", "Violence", "3", "0", "3", "0"]


def test_the_command_on_bad_data(root: Path, tmp_path: Path, capsys):
    set_line(root, 5, b"{")
    set_line(root, 7, json.loads(swapped(root, row_of(root, 7))))
    store, report = tmp_path / "bad.jsonl", tmp_path / "report.json"
    assert command.run(arguments(root, quarantine=store, json=report, images=False)) == 1
    out = capsys.readouterr().out.splitlines()
    answer = json.loads(out[-1])
    assert (answer["ok"], answer["rows"], answer["bad"]) == (False, 378, 2)
    assert {check: count for check, count in answer["checks"].items() if count} == {"json": 1, "label": 1}
    whole = json.loads(report.read_bytes())
    assert answer.items() <= whole.items() and whole["splits"]["train"]["bad"] == 2
    assert [json.loads(line)["line"] for line in store.read_bytes().splitlines()] == [5, 7]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (store, report)} == {0o600}
    assert ["train", "unreadable", "1", "1"] in [line.split() for line in out]
    assert any(line.startswith("train/metadata.jsonl, line 5: ") for line in out)


def test_the_command_refuses_before_it_works(root: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(command, "check_sage", lambda *_, **__: pytest.fail("worked"))
    for changes, says in (
        ({"json": tmp_path / "no" / "report.json"}, "choose a file in an existing folder"),
        ({"quarantine": tmp_path}, "choose a file in an existing folder"),
        ({"sage_dir": tmp_path / "no"}, "no such folder"),
    ):
        with pytest.raises(PSAError, match=says):
            command.run(arguments(**{"sage_dir": root} | changes))


# --- the stand-in, and full size


def val_labels(root: Path) -> list[tuple[str, ...]]:
    return [
        (
            record.user_id,
            record.cluster_id,
            record.category,
            str(record.index),
            PROMPT_KINDS[record.unsafe],
            "safe" if record.prefers_safe else "unsafe",
            str(int(record.banned)),
        )
        for record in sage.read_split(root, "val")
    ]


def released_labels(shared_data: Path) -> list[tuple[str, ...]]:
    columns = (
        "user_id",
        "cluster_id",
        "category",
        "prompt_idx",
        "prompt_kind",
        "chosen_kind",
        "category_banned_for_user",
    )
    with open(shared_data / "sage_labels_val.csv", newline="") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


def test_the_standin_has_the_released_labels(tmp_path: Path, shared_data: Path):
    write_standin(tmp_path / "sage", users=6, size=16, released=shared_data)
    assert val_labels(tmp_path / "sage") == released_labels(shared_data)[:42]
    assert check(tmp_path / "sage").ok


def test_the_standin_has_the_quirks(sound: Path):
    records = [record for split in SPLITS for record in sage.read_split(sound, split)]
    concepts = {record.concept for record in records}
    assert all(any(sign in concept for concept in concepts) for sign in "_-'")
    tests = [record for split in SPLITS[2:] for record in sage.read_split(sound, split)]
    assert {record.index for record in tests} == {10} and {record.index for record in records} == set(range(1, 11))
    assert not all(record.caption.isascii() for record in records)


def test_the_standin_is_the_same_again(sound: Path, tmp_path: Path):
    write_standin(tmp_path / "again", users=6, size=16)
    files = sorted(path.relative_to(sound) for path in sound.rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*"))
    assert all((sound / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files if f.suffix)


METADATA = """
import json, sys, time
from pathlib import Path
from psa_jax.data.check import check_sage
report = check_sage(Path(sys.argv[1]), images=False)
assert report.ok
print(json.dumps([sum(report.rows.values()), report.pictures, time.process_time()]))
"""


@pytest.mark.slow
def test_full_size(tmp_path: Path, shared_data: Path):
    """44,100 rows: metadata within 10 s of one core, the released val labels row by row, every picture decoded."""
    counts = write_standin(tmp_path / "sage", released=shared_data)
    assert counts == {"train": 37_800, "val": 2_100, "test_seen": 2_100, "test_unseen": 2_100}
    # In a process of its own, as annotations are checked at run time here; imports count.
    run = subprocess.run(
        [sys.executable, "-c", METADATA, tmp_path / "sage"], capture_output=True, text=True, check=True
    )
    rows, pictures, seconds = json.loads(run.stdout)
    print(f"metadata of 44,100 rows: {seconds:.1f} CPU seconds")
    assert (rows, pictures) == (44_100, 44_100) and seconds <= 10
    assert val_labels(tmp_path / "sage") == released_labels(shared_data)
    set_line(tmp_path / "sage", 30_000, b"{")
    report = check_sage(tmp_path / "sage")
    print(f"44,098 pictures or more on all cores: {report.seconds:.1f} s in all")
    assert found(report) == {("train", 30_000): {"json"}} and report.decoded >= 44_098
