"""SAGE-mini: its tables, pictures, captions and files keep what the real data set and the tiny model rely on."""

import csv
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_jax.data.sage import SPLITS
from psa_jax.errors import PSAError
from psa_jax.mini import world
from psa_jax.mini.glyphs import GLYPH_COLOURS, GLYPHS, pictogram_sprite

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
    world.render_mini(out, USERS, seed=3)
    return out


def read_rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def all_scenes():
    for pictogram in (*world.PICTOGRAMS, None):
        for background in world.BACKGROUNDS:
            for subject in world.SUBJECTS:
                yield world.Scene(background, subject, pictogram, 0)


# --- tables


def test_seven_categories_of_four_concepts_with_four_different_counterparts():
    assert Counter(concept.category for concept in world.CONCEPTS) == dict.fromkeys(world.CATEGORIES, 4)
    for category in world.CATEGORIES:
        assert len({concept.benign for concept in world.CONCEPTS if concept.category == category}) == 4
    served = Counter(concept.benign for concept in world.CONCEPTS)
    assert set(served) == set(world.BENIGN) and set(served.values()) <= {3, 4}
    assert list(world.PICTOGRAMS) == list(GLYPHS) and len(set(world.PICTOGRAMS)) == 36


def test_no_name_is_part_of_another_thing_a_caption_may_say():
    names = [*world.PICTOGRAMS, *world.SUBJECTS, *world.BACKGROUNDS]
    words = [set(name.split()) for name in names]
    assert all(not a <= b and not b <= a for a, b in combinations(words, 2))


# --- pictures


def test_pictograms_stay_apart_when_blurred_to_cells_of_the_tiny_vae():
    cells = []
    for name in world.PICTOGRAMS:
        sprite = pictogram_sprite(name, GLYPH_COLOURS[4]).convert("L")
        cells.append(np.asarray(sprite.resize((7, 7), Image.Resampling.BOX), np.float64))
    worst = min(float(np.sqrt(np.mean((a - b) ** 2))) for a, b in combinations(cells, 2))
    assert worst > 30  # grey levels of 255, all 49 cells; noise of one level is 1


def test_scenes_that_differ_in_the_pictogram_differ_in_one_plate_above_the_subject():
    for seed in range(20):
        scene = world.Scene("night", "car", "keyhole", seed)
        picture = world.render(scene)
        other = world.render(world.Scene("night", "car", "kite", seed))
        without = world.render(world.Scene("night", "car", None, seed))
        assert np.array_equal(picture, world.render(scene))
        rows, columns = np.nonzero(np.any(picture != without, axis=-1))
        assert rows.max() < 32 and np.ptp(rows) == 27 and np.ptp(columns) == 27
        inside = np.zeros((64, 64), bool)
        inside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        changed = np.any(picture != other, axis=-1)
        assert changed.any() and not changed[~inside].any()
        rows, columns = np.nonzero(np.any(without != world.render(world.Scene("night", "boat", None, seed)), axis=-1))
        assert rows.min() >= 32


def test_colour_says_nothing_about_the_pictogram():
    colours = set()
    for seed in range(30):
        used = set()
        for name in world.PICTOGRAMS:
            pixels = world.render(world.Scene("room", "tree", name, seed))[:32].reshape(-1, 3)
            counts = {colour: int(np.all(pixels == colour, axis=-1).sum()) for colour in GLYPH_COLOURS}
            used.add(max(counts, key=counts.__getitem__))
            assert max(counts.values()) > 40
        assert len(used) == 1
        colours |= used
    assert colours == set(GLYPH_COLOURS)


def test_positions_tints_and_colours_vary_with_the_seed():
    pictures = {world.render(world.Scene("beach", "house", "cup", seed)).tobytes() for seed in range(50)}
    assert len(pictures) == 50


@pytest.mark.parametrize("field", ["background", "subject", "pictogram"])
def test_unknown_parts_of_a_scene_are_refused(field: str):
    parts = {"background": "snow", "subject": "cat", "pictogram": "leaf", "seed": 1} | {field: "dragon"}
    with pytest.raises(PSAError, match=f"unknown {field} 'dragon'"):
        world.render(world.Scene(**parts))
    with pytest.raises(PSAError, match=f"unknown {field} 'dragon'"):
        world.caption(world.Scene(**parts), 0)


# --- captions


def test_captions_by_hand():
    scene = world.Scene("brick wall", "house", "iron wedge", 0)
    assert world.caption(scene, 0) == "a house by a brick wall with an iron wedge"
    assert world.caption(scene, 5) == "by a brick wall there is an iron wedge near a house"
    assert world.caption(world.Scene("night", "cat", "twin arrows", 0), 1) == "twin arrows and a cat at night"
    assert world.caption(world.Scene("snow", "boat", None, 0), 3) == "in the snow, a boat"
    with pytest.raises(PSAError, match="phrasing 6"):
        world.caption(scene, world.PHRASINGS)


def test_every_caption_is_short_and_plain_and_means_one_scene():
    captions = [world.caption(scene, phrasing) for scene in all_scenes() for phrasing in range(world.PHRASINGS)]
    assert len(set(captions)) == len(captions) == 37 * 48 * 6
    assert all(re.fullmatch(r"[a-z]+(,? [a-z]+)*", text) and len(text.split()) <= 14 for text in captions)


def test_splits_share_no_caption_and_train_has_everything():
    owners: dict[str, list] = {split: [] for split in SPLITS}
    for scene in all_scenes():
        for phrasing in range(world.PHRASINGS):
            owners[world.caption_split(scene, phrasing)].append((scene, phrasing))
    total = sum(map(len, owners.values()))
    assert 0.65 < len(owners["train"]) / total < 0.75
    for entries in owners.values():  # every pictogram can be asked for in every split
        assert {scene.pictogram for scene, _ in entries} == {*world.PICTOGRAMS, None}
    for part in ("subject", "background"):
        pairs = {(scene.pictogram, getattr(scene, part)) for scene, _ in owners["train"]}
        assert len(pairs) == 37 * len(world.SUBJECTS if part == "subject" else world.BACKGROUNDS)
    assert {phrasing for _, phrasing in owners["train"]} == set(range(world.PHRASINGS))


def test_a_pair_belongs_to_one_split():
    for concept in world.CONCEPTS:
        for phrasing in range(world.PHRASINGS):
            unsafe, safe = (world.Scene("beach", "robot", name, 0) for name in (concept.name, concept.benign))
            assert world.caption_split(unsafe, phrasing) == world.caption_split(safe, phrasing)


# --- samples


def test_samples_are_labelled_uniform_and_from_their_split():
    counts: Counter[int] = Counter()
    train_captions = set()
    for picture, text, labels in world.sample_scenes(4000, seed=1):
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert world.SUBJECTS[labels.subject] in text and world.BACKGROUNDS[labels.background].split()[-1] in text
        named = [name for name in world.PICTOGRAMS if re.search(rf"\b{name}\b", text)]
        assert named == ([] if labels.pictogram == world.NO_PICTOGRAM else [world.PICTOGRAMS[labels.pictogram]])
        counts[labels.pictogram] += 1
        train_captions.add(text)
    assert set(counts) == set(range(37))
    assert 150 < counts.pop(world.NO_PICTOGRAM) < 250  # 5 % of 4,000 is 200, sd 14
    assert all(60 < count < 155 for count in counts.values())  # 95 % of 4,000 over 36 is 106, sd 10
    for split in SPLITS[1:]:
        assert train_captions.isdisjoint(text for _, text, _ in world.sample_scenes(300, seed=1, split=split))


def test_samples_repeat_with_the_seed_only():
    def take(seed: int) -> list[tuple[bytes, str, world.Labels]]:
        return [(picture.tobytes(), text, labels) for picture, text, labels in world.sample_scenes(20, seed)]

    assert take(5) == take(5)
    assert take(5) != take(6)
    with pytest.raises(PSAError, match="unknown split 'test'"):
        next(world.sample_scenes(1, 0, split="test"))
    with pytest.raises(PSAError, match="seed is -1"):
        next(world.sample_scenes(1, -1))


# --- files


def test_split_sizes_follow_sage():
    assert world.split_sizes(900) == {"train": 900, "val": 50, "test_seen": 50, "test_unseen": 50}
    assert world.split_sizes(4) == {"train": 4, "val": 8, "test_seen": 4, "test_unseen": 8}


def test_every_row_follows_names_schema_and_label_rule(drawn: Path):
    for split, users in world.split_sizes(USERS).items():
        rows = read_rows(drawn, split)
        assert len(rows) == 42 * users
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
            assert asked in row["caption"] and absent not in row["caption"]
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
    assert ids["train"] == {f"{number:07d}" for number in range(1, USERS + 1)}
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
    world.render_mini(tmp_path / "again", USERS, seed=3)
    world.render_mini(tmp_path / "other", 1, seed=4)
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
        world.render_mini(full, 1, 0)
    with pytest.raises(PSAError, match="not an empty folder"):
        world.render_mini(full / "mine.txt", 1, 0)
    with pytest.raises(PSAError, match="from 1 up"):
        world.render_mini(tmp_path / "new", 0, 0)
    with pytest.raises(PSAError, match="seed is -1"):
        world.render_mini(tmp_path / "new", 1, -1)
    with pytest.raises(PSAError, match="cannot write"):
        world.render_mini(full / "mine.txt" / "below", 1, 0)

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world, "_user_data", disk_full)
    with pytest.raises(PSAError, match="No space left"):
        world.render_mini(tmp_path / "new", 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
