"""Own pairs: every line is checked, pictures never leave their folder, and what is read is what a batch holds."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_jax.data import build
from psa_jax.data.balancing import UserSampler, row_order
from psa_jax.data.layouts import find_layout
from psa_jax.data.own_pairs import FIELDS, read_own_pairs
from psa_jax.data.rows import NO_CATEGORY
from psa_jax.data.shards import open_shards, read_info
from psa_jax.errors import PSAError

BANNED = {"prompt": "a spider", "chosen": "p/s.png", "rejected": "p/u.png", "user_id": "0000001", "banned": True}
ALLOWED = BANNED | {"chosen": "p/u.png", "rejected": "p/s.png", "user_id": "0000002", "banned": False}
SAFE = {"prompt": "a tree", "chosen": "p/t.png", "rejected": "p/u.png", "user_id": "0000001", "banned": False}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with three pictures, of one size."""
    folder = tmp_path / "pairs"
    (folder / "p").mkdir(parents=True)
    for number, name in enumerate("sut"):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "p" / f"{name}.png")
    return folder


def written(folder: Path, *rows: object, split: str = "train") -> Path:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_prompt_that_anybody_bans_is_unsafe_for_all(pictures):
    folder = written(pictures, BANNED | {"safe_prompt": "a flower"}, ALLOWED, SAFE)
    written(pictures, ALLOWED | {"prompt": "a tree"}, split="val")
    found = read_own_pairs(folder, ["train", "val"])
    banned, allowed, safe = found["train"]
    assert [row.unsafe for row in found["train"]] == [True, True, False]
    # What one row says of a prompt holds for all of them.
    assert (banned.safe_caption, allowed.safe_caption, safe.safe_caption) == ("a flower", "a flower", "a tree")
    assert banned.pictures == {name: (folder / name).resolve() for name in ("p/s.png", "p/u.png")}
    assert not found["val"][0].unsafe and find_layout(folder)[1] == ["train", "val"]
    written(pictures, ALLOWED | {"category": "Shocking"})
    assert read_own_pairs(folder, ["train"])["train"][0].unsafe  # a category says so, too


def test_shards_hold_what_the_lines_say(pictures, tmp_path, encode, build_options, capsys):
    cat = {"prompt": "a cat", "category": "Shocking"}
    written(pictures, BANNED | {"safe_prompt": "a flower"}, ALLOWED, SAFE, BANNED | cat)
    shards = open_shards(build.build_shards(pictures, tmp_path / "out", encode=encode, **build_options), "train")
    assert "train: 1 of 4 rows: an unsafe prompt whose safe prompt is not there" in capsys.readouterr().err
    rows = [shards[index] for index in range(4)]
    assert [row["banned"] for row in rows] == [True, False, False, True]
    assert [row["kind"] for row in rows] == [1, 1, 0, 1] and [row["twin"] for row in rows] == [True, True, True, False]
    assert [row["category"] for row in rows] == [*[NO_CATEGORY] * 3, 5]
    assert shards.columns.categories.tolist() == [*[NO_CATEGORY] * 3, 5]
    assert rows[0]["safe_input_ids"].tolist() == [ord(character) for character in "a flower"]
    np.testing.assert_array_equal(rows[1]["safe_input_ids"], rows[0]["safe_input_ids"])
    np.testing.assert_array_equal(rows[3]["safe_input_ids"], rows[3]["input_ids"])
    np.testing.assert_array_equal(rows[0]["moments_chosen"], rows[1]["moments_rejected"])
    assert not np.array_equal(rows[0]["moments_chosen"], rows[0]["moments_rejected"])
    assert read_info(tmp_path / "out")["pictures"] == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SAGE's licence" not in card and "their authors'" in card

    with pytest.raises(PSAError, match="prompt without a category.*data.balance to rows or none"):
        UserSampler.of(shards.columns)
    assert sorted(row_order(shards.columns, "none", 0.3, 0).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": " "}, "prompt must be a text"),
        ({"chosen": 3}, "chosen must be a text"),
        ({"banned": 1}, "banned must be true or false"),
        ({"user_id": "12"}, "seven digits"),
        ({"category": "Spiders"}, "category must be one of"),
        ({"chosen": "p/u.png"}, "one picture"),
        ({"chosen": "p/gone.png"}, "chosen: no such picture"),
        ({"chosen": "/etc/hostname"}, "path inside the folder"),
        ({"chosen": "p/../p/s.png"}, "path inside the folder"),
        ({"chosen": "p\\s.png"}, "path inside the folder"),
        ({"rejected": "out.png"}, "link that leads out"),
        ({"rejected": "p"}, "no such picture"),
        ({"religion": "Islam"}, "unknown fields"),
    ],
)
def test_a_bad_line_is_named_without_its_values(pictures, tmp_path, change, message):
    (tmp_path / "elsewhere.png").write_bytes((pictures / "p" / "s.png").read_bytes())
    (pictures / "out.png").symlink_to(tmp_path / "elsewhere.png")
    written(pictures, SAFE, BANNED | change)
    with pytest.raises(PSAError, match=message) as error:
        read_own_pairs(pictures, ["train"])
    assert f"{pictures / 'train.jsonl'}, line 2: " in str(error.value)
    assert "Islam" not in str(error.value) and "Spiders" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "values"), [("category", ("Hate", "Shocking")), ("safe_prompt", ("a flower", "a cup"))]
)
def test_a_prompt_has_one_category_and_one_safe_prompt(pictures, name, values):
    written(pictures, *({**BANNED, name: value} for value in values[:1] * 2))
    assert len(read_own_pairs(pictures, ["train"])["train"]) == 2
    written(pictures, *({**BANNED, name: value} for value in values))
    with pytest.raises(PSAError, match=f"line 2: {name} is not that of an earlier row with this prompt"):
        read_own_pairs(pictures, ["train"])


@pytest.mark.parametrize("field", [name for name, needed in FIELDS.items() if needed])
def test_what_a_line_lacks_is_named(pictures, field):
    written(pictures, {name: value for name, value in BANNED.items() if name != field})
    with pytest.raises(PSAError, match=f"line 1: row lacks {field}"):
        read_own_pairs(pictures, ["train"])


@pytest.mark.parametrize(
    "content, message",
    [(b"", "no rows"), (b"{", "line 1"), (b"\xff\n", "UTF-8"), (b'{"prompt": "\\ud800"}', "line 1")],
)
def test_files_that_hold_no_lines(pictures, content, message):
    (pictures / "train.jsonl").write_bytes(content)
    with pytest.raises(PSAError, match=message):
        read_own_pairs(pictures, ["train"])


def test_a_folder_is_of_one_layout(pictures):
    with pytest.raises(PSAError, match="nor a file such as train.jsonl"):
        find_layout(pictures)
    written(pictures, SAFE)
    (pictures / "val").mkdir()
    with pytest.raises(PSAError, match="both SAGE's folders and files of own pairs"):
        find_layout(pictures)
    (pictures / "train.jsonl").unlink()
    assert find_layout(pictures)[1] == ["val"]  # without its metadata.jsonl: refused when it is read
    (pictures / "val").rmdir()
    (pictures / "train.jsonl").symlink_to(pictures / "gone.jsonl")
    with pytest.raises(PSAError, match=r"train.jsonl"):
        read_own_pairs(pictures, find_layout(pictures)[1])
