import csv
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.small_sage import write_rows

from psa_jax.data import sage
from psa_jax.data.check import check_sage
from psa_jax.errors import PSAError
from psa_jax.profiles.population import sample_population

ROW = {
    "file_name": "user_0000001_self-harm_don't-look_twice_00012.jpg_u.jpg",
    "chosen": "user_0000001_self-harm_don't-look_twice_00012_u.jpg",
    "rejected": "user_0000001_self-harm_don't-look_twice_00012_s.jpg",
    "caption": "a prompt",
    "user_data": {
        "User_ID": "0000001",
        "Cluster_ID": "13",
        "Age": 18,
        "Age_Group": "adolescents",
        "Gender": "male",
        "Religion": "Islam",
        "Physical_Condition": "healthy",
        "Mental_Condition": "healthy",
    },
}  # first user of users.csv: bans Propaganda and Sexuality


def changed(**changes: object) -> str:
    return json.dumps(ROW | changes)


def user_changed(**changes: object) -> str:
    return changed(user_data=ROW["user_data"] | changes)


def test_file_name_with_hyphens_underscores_and_apostrophe():
    name = sage.parse_file_name(ROW["file_name"])
    assert name == (
        "user_0000001_self-harm_don't-look_twice_00012",
        "0000001",
        "Self-Harm",
        "don't-look_twice",
        12,
        True,
    )


@pytest.mark.parametrize(
    "name",
    [
        "user_0000001_hate_x_00001.jpg",
        "user_0000001_hate_x_00001_u.jpg",
        "user_000001_hate_x_00001.jpg_u.jpg",
        "user_000000a_hate_x_00001.jpg_u.jpg",
        "user_٠٠٠٠٠٠١_hate_x_00001.jpg_u.jpg",  # digits of another script
        "user_0000001_hate_x_00001.jpg_x.jpg",
        "user_0000001_hate_x_00001.jpg_u.jpg\n",
        "user_0000001_Hate_x_00001.jpg_u.jpg",
        "user_0000001_gossip_x_00001.jpg_u.jpg",
        "user_0000001_hate_../../x_00001.jpg_u.jpg",
        "user_0000001_hate_a/b_00001.jpg_u.jpg",
        "/user_0000001_hate_x_00001.jpg_u.jpg",
        "",
    ],
)
def test_bad_file_names_are_refused(name: str):
    with pytest.raises(PSAError):
        sage.parse_file_name(name)


def test_row_properties():
    record = sage.parse_row(json.dumps(ROW))
    assert (record.category, record.unsafe, record.banned, record.prefers_safe) == ("Self-Harm", True, False, False)
    assert (record.safe_image, record.unsafe_image) == (ROW["rejected"], ROW["chosen"])
    assert record.profile == sample_population(1)[0]
    assert "Islam" not in repr(record) and "male" not in repr(record)  # attributes stay out of logs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSON"),
        ("", "JSON"),
        ("[]", "list"),
        ("[" * 100_000, "JSON"),
        ('{"file_name": 1' + "0" * 5000 + "}", "JSON"),
        ('{"caption": NaN}', "NaN"),
        (json.dumps(ROW)[:-1] + ', "caption": "again"}', "twice"),
        (json.dumps({key: value for key, value in ROW.items() if key != "caption"}), "lacks caption"),
        (changed(extra=1), "unknown fields"),
        (changed(caption=3), "caption is of type int"),
        (changed(caption=" "), "caption is empty"),
        (
            '{"caption": "\\ud800"' + json.dumps({k: v for k, v in ROW.items() if k != "caption"})[1:].join([", ", ""]),
            "surr",
        ),
        (changed(chosen=ROW["rejected"]), "both"),
        (changed(chosen=ROW["rejected"], rejected=ROW["chosen"]), "label rule"),
        (changed(chosen="../" + ROW["chosen"]), "plain file name"),
        (changed(chosen="/etc/passwd"), "plain file name"),
        (changed(chosen=ROW["chosen"].replace("00012", "00013")), "file_name allows"),
        (changed(user_data=[]), "user_data"),
        (user_changed(User_ID="0000002"), "must be equal"),
        (user_changed(User_ID=None), "User_ID must be"),
        (user_changed(User_ID="000000a"), "User_ID must be"),
        (user_changed(Religion=None), "Religion must be one of"),
        (user_changed(Religion="nan"), "Religion must be one of"),
        (user_changed(Cluster_ID=13), "Cluster_ID"),
        (user_changed(Cluster_ID="40"), "Cluster_ID"),
        (user_changed(Banned=[]), "unknown fields"),
        (user_changed(Age=True), "Age must be"),
        (user_changed(Age="18"), "Age must be"),
        (user_changed(Age=-1), "Age must be"),
        (user_changed(Age=20), "Age_Group is not"),
        (user_changed(Gender="Male"), "Gender must be"),
    ],
)
def test_bad_rows_are_refused(text: str, says: str):
    with pytest.raises(PSAError, match=says) as caught:
        sage.parse_row(text)
    assert "\n" not in str(caught.value)


def test_label_rule_matches_released_labels(shared_data: Path):
    """Every row of the real val split, written in the on-disk form, is accepted; its opposite is refused."""
    users = {user.user_id: user for user in sample_population(1000)}
    kinds = {"safe": "s", "unsafe": "u"}
    with open(shared_data / "sage_labels_val.csv", newline="") as file:
        labels = list(csv.DictReader(file))
    assert len(labels) == 2100
    for label in labels:
        stem = f"user_{label['user_id']}_{label['category'].lower()}_concept_{int(label['row']):05d}"
        images = [f"{stem}_{kinds[label['chosen_kind']]}.jpg"]
        images.append(f"{stem}_{'u' if label['chosen_kind'] == 'safe' else 's'}.jpg")
        row = {
            "file_name": f"{stem}.jpg_{kinds[label['prompt_kind']]}.jpg",
            "chosen": images[0],
            "rejected": images[1],
            "caption": "x",
            "user_data": users[label["user_id"]].to_mapping() | {"Cluster_ID": label["cluster_id"]},
        }
        record = sage.parse_row(json.dumps(row))
        assert record.banned == (label["category_banned_for_user"] == "1")
        assert record.prefers_safe == (label["chosen_kind"] == "safe")
        with pytest.raises(PSAError, match="label rule"):
            sage.parse_row(json.dumps(row | {"chosen": images[1], "rejected": images[0]}))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_one_wrong_value_is_never_accepted(data: st.DataObject):
    """Any other value in place of a good row's: always a PSAError, never another exception, never accepted."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    )
    field = data.draw(st.sampled_from([key for key in ROW if key != "caption"]))
    value = data.draw(anything)
    with pytest.raises(PSAError):
        sage.parse_row(changed(**{field: value}))


def test_reads_a_split_in_order(sage_dir: Path):
    records = sage.read_split(sage_dir, "train")
    lines = (sage_dir / "train" / "metadata.jsonl").read_text().splitlines()
    assert len(records) == 2 * 7 * 2 * 2
    assert [record.file_name for record in records] == [json.loads(line)["file_name"] for line in lines]


def test_reads_sage_mini(tmp_path: Path):
    from psa_jax.mini.dataset import render_mini

    sizes = render_mini(tmp_path / "mini", users=1, seed=0)
    for split, rows in sizes.items():
        assert len(sage.read_split(tmp_path / "mini", split)) == rows


def break_line(sage_dir: Path, number: int, line: str | bytes) -> None:
    path = sage_dir / "train" / "metadata.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(("line", "says"), [("{", "JSON"), (b"\xff", "UTF-8"), ("", "JSON")])
def test_error_names_file_and_line(sage_dir: Path, line: str | bytes, says: str):
    break_line(sage_dir, 3, line)
    with pytest.raises(PSAError, match=rf"train/metadata\.jsonl, line 3: .*{says}"):
        sage.read_split(sage_dir, "train")


def test_a_row_given_twice_is_refused(sage_dir: Path):
    first = (sage_dir / "train" / "metadata.jsonl").read_text().split("\n")[0]
    break_line(sage_dir, 3, first)
    with pytest.raises(PSAError, match="line 3: .* on line 1 too"):
        sage.read_split(sage_dir, "train")


def first_image(sage_dir: Path) -> Path:
    line = (sage_dir / "train" / "metadata.jsonl").read_text().split("\n")[0]
    return sage_dir / "train" / json.loads(line)["chosen"]


def test_missing_picture_and_links(sage_dir: Path, tmp_path: Path):
    path = first_image(sage_dir)
    outside = tmp_path / "outside.jpg"
    path.rename(outside)
    with pytest.raises(PSAError, match="line 1: picture .* is missing"):
        sage.read_split(sage_dir, "train")
    path.symlink_to(outside)
    with pytest.raises(PSAError, match="line 1: picture .* leads out"):
        sage.read_split(sage_dir, "train")
    with pytest.raises(PSAError, match="leads out"):
        sage.image_path(sage_dir, "train", path.name)
    path.unlink()
    outside.rename(sage_dir / "kept.jpg")
    path.symlink_to(sage_dir / "kept.jpg")  # a link inside the folder is fine
    assert sage.read_split(sage_dir, "train")
    assert sage.image_path(sage_dir, "train", path.name) == (sage_dir / "kept.jpg").resolve()
    path.unlink()
    path.symlink_to(path.name)  # a link to itself
    with pytest.raises(PSAError, match="not a file"):
        sage.read_split(sage_dir, "train")
    with pytest.raises(PSAError, match="missing"):
        sage.image_path(sage_dir, "train", path.name)
    path.unlink()
    path.mkdir()
    with pytest.raises(PSAError, match="not a file"):
        sage.read_split(sage_dir, "train")


def test_metadata_that_leads_out_is_refused(sage_dir: Path, tmp_path: Path):
    path = sage_dir / "train" / "metadata.jsonl"
    path.rename(tmp_path / "elsewhere.jsonl")
    path.symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(PSAError, match="metadata.jsonl: a link that leads out"):
        sage.read_split(sage_dir, "train")


def test_a_bad_row_does_not_stop_the_scan(sage_dir: Path):
    break_line(sage_dir, 3, "{")
    first_image(sage_dir).unlink()
    lines = sage.split_lines(sage_dir, "train")
    rows = list(sage.scan_lines(sage_dir, "train", lines))
    assert [row.line for row in rows] == list(range(1, 57))
    bad = {row.line: [problem.check for problem in row.problems] for row in rows if row.problems}
    assert bad == {1: ["pictures"], 2: ["pictures"], 3: ["json"]}
    assert len(rows[0].pictures) == 1 and rows[2].record is None


def test_errors_never_quote_a_profile():
    """Any field of user_data with a secret in it: the error names the field, not the secret."""
    for field in ROW["user_data"]:
        for secret in ("sesame", ["sesame"], {"sesame": "sesame"}):
            with pytest.raises(PSAError, match=field) as caught:
                sage.parse_row(user_changed(**{field: secret}))
            assert "sesame" not in str(caught.value) and caught.value.__cause__ is None


def test_split_that_leads_out_is_refused(sage_dir: Path, tmp_path: Path):
    (sage_dir / "train").rename(tmp_path / "elsewhere")
    (sage_dir / "train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PSAError, match="leads out"):
        sage.read_split(sage_dir, "train")


@pytest.mark.parametrize("linked", ["train", "train/metadata.jsonl", "picture"])
def test_the_advice_about_links_works(sage_dir: Path, tmp_path: Path, linked: str):
    path = first_image(sage_dir) if linked == "picture" else sage_dir / linked
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PSAError, match="leads out") as caught:
        sage.read_split(sage_dir, "train")
    command = shlex.split(str(caught.value).split("lead to: ")[1])
    assert command[:2] == ["cp", "-rL"] and command[3:] == ["NEW"]
    source = sage_dir if command[2] == "FOLDER" else command[2]
    subprocess.run(["cp", "-rL", source, tmp_path / "a copy"], check=True)
    assert len(sage.read_split(tmp_path / "a copy", "train")) == 56


def cached(sage_dir: Path, cache: Path) -> Path:
    """The folder as the hub's cache has it: links into `blobs`, each file under the hash of its content."""
    repository = cache / "datasets--owner--sage"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for path in sorted(sage_dir.rglob("*.*")):
        link = snapshot / path.relative_to(sage_dir)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_the_hubs_cache_is_read(sage_dir: Path, tmp_path: Path):
    snapshot = cached(sage_dir, tmp_path / "hub")
    records = sage.read_split(snapshot, "train")
    assert records == sage.read_split(sage_dir, "train")
    found = sage.image_path(snapshot, "train", records[0].chosen)
    assert found.parent.name == "blobs" and found.read_bytes() == first_image(sage_dir).read_bytes()
    (tmp_path / "short").symlink_to(snapshot)
    assert sage.read_split(tmp_path / "short", "train") == records


def test_links_of_the_hubs_cache_lead_nowhere_else(sage_dir: Path, tmp_path: Path):
    """Out of the cache, into another repository, or through a `blobs` that is itself a link."""
    snapshot = cached(sage_dir, tmp_path / "hub")
    blobs = snapshot.parents[1] / "blobs"
    name = first_image(sage_dir).name
    picture, blob = snapshot / "train" / name, Path(os.path.realpath(snapshot / "train" / name))
    for target in (tmp_path / "secret", tmp_path / "hub" / "models--a--b" / "blobs" / "1", blobs / "deep" / "1"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(blob, target)
        picture.unlink()
        picture.symlink_to(target)
        with pytest.raises(PSAError, match="leads out"):
            sage.read_split(snapshot, "train")
        with pytest.raises(PSAError, match="leads out"):
            sage.image_path(snapshot, "train", name)
    picture.unlink()
    picture.symlink_to(blob)
    assert sage.read_split(snapshot, "train")
    blobs.rename(tmp_path / "private")
    blobs.symlink_to(tmp_path / "private")
    with pytest.raises(PSAError, match="leads out"):
        sage.read_split(snapshot, "train")


def test_a_folder_without_the_caches_name_is_none(sage_dir: Path, tmp_path: Path):
    snapshot = cached(sage_dir, tmp_path / "hub")
    snapshot.parents[1].rename(tmp_path / "hub" / "sage")
    with pytest.raises(PSAError, match="leads out"):
        sage.read_split(tmp_path / "hub" / "sage" / "snapshots" / snapshot.name, "train")


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b"\r\n\r\n \n"])
def test_what_editors_add_to_metadata_is_no_row(sage_dir: Path, end: bytes):
    path, records = sage_dir / "train" / "metadata.jsonl", sage.read_split(sage_dir, "train")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n").replace(b"\n", b"\r\n") + end)
    assert sage.read_split(sage_dir, "train") == records
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\r\n\r\n", 1))
    with pytest.raises(PSAError, match="line 2: not valid JSON"):  # in between, something may be lost
        sage.read_split(sage_dir, "train")
    path.write_bytes(b"\xef\xbb\xbf" + end)
    with pytest.raises(PSAError, match="no rows in it"):
        sage.read_split(sage_dir, "train")


@pytest.mark.parametrize("of_rows", ["NFC", "NFD"])
@pytest.mark.parametrize("of_files", ["NFC", "NFD"])
def test_letters_with_marks_have_two_spellings(sage_dir: Path, of_rows: str, of_files: str):
    folder = sage_dir / "train"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        for field in ("file_name", "chosen", "rejected"):
            row[field] = unicodedata.normalize(of_rows, row[field].replace("a_thing", "café_각"))
    write_rows(folder, rows)
    for path in folder.glob("*a_thing*"):
        path.rename(folder / unicodedata.normalize(of_files, path.name.replace("a_thing", "café_각")))
    records = sage.read_split(sage_dir, "train")
    assert len(records) == 56 and records[0].concept == "café_각"
    for name in (records[0].chosen, rows[0]["chosen"]):
        assert sage.image_path(sage_dir, "train", name).is_file()
    assert check_sage(sage_dir, processes=1).ok


@pytest.mark.parametrize("split", ["nope", "..", "val"])
def test_missing_split(sage_dir: Path, split: str):
    with pytest.raises(PSAError):
        sage.read_split(sage_dir, split)
