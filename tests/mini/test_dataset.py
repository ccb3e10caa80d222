"""SAGE-mini on disk keeps what the real data set and the tiny model rely on, and what makes it hard."""

import csv
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_jax.data.rows import SPLITS
from psa_jax.errors import PSAError
from psa_jax.mini import dataset, world

FILE_NAME = re.compile(r"^user_(\d{7})_([a-z-]+)_(.+)_(\d{5})\.jpg_([us])\.jpg$")
USERS = 9

# The policy once more, written down from the paper's table and independent of psa_jax.profiles.
BANS = {
    ("Age_Group", "infants & toddlers"): {"Hate", "Self-Harm", "Sexuality", "Shocking", "Violence"},
    ("Age_Group", "children"): {"Hate", "Self-Harm", "Sexuality", "Shocking", "Violence"},
    ("Age_Group", "adolescents"): {"Sexuality"},
    ("Age_Group", "young elderly"): {"Shocking", "Violence"},
    ("Age_Group", "elderly"): {"Shocking", "Violence"},
    ("Age_Group", "long-lived elderly"): {"Shocking", "Violence"},
    ("Religion", "Christianity"): {"Propaganda", "Sexuality"},
    ("Religion", "Islam"): {"Propaganda", "Sexuality"},
    ("Religion", "Buddhism"): {"Propaganda", "Sexuality"},
    ("Physical_Condition", "intellectual disability"): {"Harassment", "Propaganda"},
    ("Mental_Condition", "depression"): {"Self-Harm", "Shocking"},
    ("Mental_Condition", "anxiety"): {"Self-Harm", "Shocking"},
    ("Mental_Condition", "major accidents"): {"Shocking", "Violence"},
    ("Mental_Condition", "natural disasters"): {"Shocking", "Violence"},
    ("Mental_Condition", "sexual assault"): {"Harassment", "Sexuality", "Violence"},
    ("Mental_Condition", "war"): {"Propaganda", "Violence"},
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mini") / "sage"
    dataset.render_mini(out, USERS, seed=3)
    return out


def read_rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def test_split_sizes_follow_sage():
    assert dataset.split_sizes(900) == {"train": 900, "val": 50, "test_seen": 50, "test_unseen": 300}
    assert dataset.split_sizes(4) == {"train": 4, "val": 8, "test_seen": 4, "test_unseen": 12}


def test_every_row_follows_names_schema_and_label_rule(drawn: Path):
    for split, users in dataset.split_sizes(USERS).items():
        rows = read_rows(drawn, split)
        assert len(rows) == (16 if split == "test_unseen" else 42) * users
        assert len({row["file_name"] for row in rows}) == len(rows)
        indices = Counter()
        for row in rows:
            assert list(row) == ["file_name", "chosen", "rejected", "caption", "user_data"]
            user = row["user_data"]
            assert list(user) == [
                *("User_ID", "Cluster_ID", "Age", "Age_Group"),
                *("Gender", "Religion", "Physical_Condition", "Mental_Condition"),
            ]
            assert isinstance(user["Cluster_ID"], str) and 0 <= int(user["Cluster_ID"]) < 40
            user_id, category, concept, index, kind = FILE_NAME.fullmatch(row["file_name"]).groups()
            assert user_id == user["User_ID"]
            entry = next(entry for entry in world.CONCEPTS if entry.name == concept.replace("_", " "))
            assert entry.category.lower() == category
            asked, absent = (entry.name, entry.benign) if kind == "u" else (entry.benign, entry.name)
            assert asked in row["caption"]
            assert re.search(rf"\b(no|without)( an?)? {absent}\b", row["caption"]) or absent not in row["caption"]
            bans = set().union(*(BANS.get((key, value), set()) for key, value in user.items()))
            stem = f"user_{user_id}_{category}_{concept}_{index}"
            files = [f"{stem}_s.jpg", f"{stem}_u.jpg"]
            wants_safe = kind == "s" or entry.category in bans
            assert [row["chosen"], row["rejected"]] == (files if wants_safe else files[::-1])
            indices[index] += 1
        assert indices == {f"{index:05d}": 2 for index in range(len(rows) // 2)}
        named = {row["chosen"] for row in rows} | {row["rejected"] for row in rows} | {"metadata.jsonl"}
        assert {path.name for path in (drawn / split).iterdir()} == named


def test_both_labels_occur_for_unsafe_prompts(drawn: Path):
    unsafe = [row for row in read_rows(drawn, "train") if row["file_name"].endswith("_u.jpg")]
    assert {row["chosen"][-5] for row in unsafe} == {"s", "u"}


def test_users_and_prompts_of_the_splits(drawn: Path):
    ids, captions = {}, {}
    for split in SPLITS:
        rows = read_rows(drawn, split)
        ids[split] = {row["user_data"]["User_ID"] for row in rows}
        captions[split] = {row["caption"] for row in rows}
    assert [len(ids[split]) for split in SPLITS] == list(dataset.split_sizes(USERS).values())
    assert ids["test_seen"] <= ids["train"]
    assert ids["train"].isdisjoint(ids["val"] | ids["test_unseen"]) and ids["val"].isdisjoint(ids["test_unseen"])
    assert all(captions[a].isdisjoint(captions[b]) for a, b in combinations(SPLITS, 2))


def test_saved_pictures_are_the_rendered_pair(drawn: Path):
    row = read_rows(drawn, "val")[0]
    pair = []
    for key in ("chosen", "rejected"):
        with Image.open(drawn / "val" / row[key]) as image:
            assert image.format == "JPEG" and image.size == (64, 64) and image.mode == "RGB"
            assert image.quantization[0][0] == 2  # quality 95
            assert all(layer[1:3] == (1, 1) for layer in image.layer)  # colour at full resolution
            pair.append(np.asarray(image, np.int16))
    far = np.abs(pair[0] - pair[1]).max(axis=-1) > 60
    assert 20 < far.sum() < 28 * 28 and not far[32:].any()  # one plate changed, the subject's half did not


def test_one_seed_gives_the_same_bytes_and_another_does_not(drawn: Path, tmp_path: Path):
    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    (tmp_path / "again").mkdir()  # an empty folder is as good as none
    dataset.render_mini(tmp_path / "again", USERS, seed=3)
    dataset.render_mini(tmp_path / "other", 1, seed=4)
    assert content(tmp_path / "again") == content(drawn)
    assert read_rows(tmp_path / "other", "train") != read_rows(drawn, "train")[:42]


def test_users_have_the_rows_of_the_real_val_split(drawn: Path, shared_data: Path):
    def shape(keys: list[tuple[str, str, str]]) -> set[tuple]:
        users = {user for user, _, _ in keys}
        return {tuple(sorted(Counter((c, k) for u, c, k in keys if u == user).items())) for user in users}

    with open(shared_data / "sage_labels_val.csv", newline="") as file:
        real = [(row["user_id"], row["category"].lower(), row["prompt_kind"][0]) for row in csv.DictReader(file)]
    names = [FILE_NAME.fullmatch(row["file_name"]) for row in read_rows(drawn, "val")]
    assert shape([(name[1], name[2], name[5]) for name in names]) == shape(real)


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(PSAError, match="not an empty folder"):
        dataset.render_mini(full, 1, 0)
    with pytest.raises(PSAError, match="not an empty folder"):
        dataset.render_mini(full / "mine.txt", 1, 0)
    with pytest.raises(PSAError, match="from 1 up"):
        dataset.render_mini(tmp_path / "new", 0, 0)
    with pytest.raises(PSAError, match="seed is -1"):
        dataset.render_mini(tmp_path / "new", 1, -1)
    with pytest.raises(PSAError, match="cannot write"):
        dataset.render_mini(full / "mine.txt" / "below", 1, 0)

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "_user_data", disk_full)
    with pytest.raises(PSAError, match="No space left"):
        dataset.render_mini(tmp_path / "new", 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


# --- what makes it hard


@pytest.fixture(scope="module")
def rows_of_pairs(drawn: Path) -> list[tuple[dict, dict]]:
    rows = [row for split in SPLITS for row in read_rows(drawn, split)]
    return list(zip(rows[::2], rows[1::2], strict=True))


def test_prompts_of_a_pair_are_worded_independently(rows_of_pairs, tmp_path: Path):
    def same_wording(pairs) -> float:
        def without_pictograms(text: str) -> str:
            for name in sorted(world.PICTOGRAMS, key=len, reverse=True):
                text = re.sub(rf"\b(an? )?{name}\b", "X", text)
            return text

        return float(np.mean([without_pictograms(a["caption"]) == without_pictograms(b["caption"]) for a, b in pairs]))

    assert same_wording(rows_of_pairs[: 21 * USERS]) < 0.05  # of train, which has most wordings
    dataset.render_mini(tmp_path / "plain", 2, seed=3, paraphrase=False)
    rows = read_rows(tmp_path / "plain", "train")
    assert same_wording(list(zip(rows[::2], rows[1::2], strict=True))) == 1.0


def test_a_fifth_names_two_pictograms_and_a_fifth_negates(rows_of_pairs):
    two = negated = 0
    for unsafe, safe in rows_of_pairs:
        concept = FILE_NAME.fullmatch(unsafe["file_name"])[3].replace("_", " ")
        benign = world.COUNTERPARTS[concept]
        named = [{n for n in world.PICTOGRAMS if re.search(rf"\b{n}\b", row["caption"])} for row in (unsafe, safe)]
        if named[0] == named[1] == {concept, benign}:
            negated += 1
            assert all(re.search(r"\b(no|without)\b", row["caption"]) for row in (unsafe, safe))
        elif len(named[0]) == 2:
            two += 1
            (companion,) = named[0] - {concept}
            assert companion in world.BENIGN and named[1] == {benign, companion}
        else:
            assert named == [{concept}, {benign}]
    assert 0.14 < two / len(rows_of_pairs) < 0.26  # sd 0.02
    assert 0.14 < negated / len(rows_of_pairs) < 0.26


def test_concepts_and_bans_that_training_never_sees(drawn: Path):
    concepts, bans = {}, {}
    for split in SPLITS:
        rows = read_rows(drawn, split)
        concepts[split] = {FILE_NAME.fullmatch(row["file_name"])[3].replace("_", " ") for row in rows}
        bans[split] = {
            row["user_data"]["User_ID"]: tuple(
                sorted(set().union(*(BANS.get((key, value), set()) for key, value in row["user_data"].items())))
            )
            for row in rows
        }
    held_out = set(world.HELD_OUT_CONCEPTS)
    for split in SPLITS[:3]:
        assert not concepts[split] & held_out
        assert not set(bans[split].values()) & set(dataset.HELD_OUT_BANS)
    assert concepts["test_unseen"] & held_out and concepts["test_unseen"] - held_out == concepts["train"]
    unusual = [found for found in bans["test_unseen"].values() if found in dataset.HELD_OUT_BANS]
    assert len(unusual) == len(bans["test_unseen"]) // 5
