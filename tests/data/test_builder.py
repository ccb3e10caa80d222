"""Shards hold what SAGE says, each picture encoded once, and appear complete or not at all."""

import filecmp
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import DatasetCard
from PIL import Image
from tensorflow_datasets.core.utils import tqdm_utils

from psa_jax.data import build, builder, sage
from psa_jax.data.encoding import TextCache
from psa_jax.data.preprocess import Preprocess
from psa_jax.data.shards import open_shards, preprocess_of, read_empty_prompt, read_info
from psa_jax.errors import PSAError


def test_shards_hold_the_rows(sage_dir: Path, tmp_path: Path, encode, build_options):
    out = build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    records = sage.read_split(sage_dir, "train")
    shards = open_shards(out, "train", expect_fingerprint="f00d")
    assert len(shards) == len(records) == 56
    for index, record in enumerate(records):
        row = shards[index]
        assert row["file_name"].decode() == record.file_name
        assert row["caption"].decode() == record.caption
        assert row["user_id"].decode() == record.user_id
        assert (row["kind"], row["banned"]) == (int(record.unsafe), record.banned)
        assert sage.CATEGORIES[row["category"]] == record.category
        assert (row["original_size"].tolist(), row["crop"].tolist()) == ([8, 12], [0, 2])
        assert row["input_ids"].tolist() == [ord(character) for character in record.caption[:8]]
        assert row["input_ids"].dtype == np.int32
        for name, moments in ((record.chosen, row["moments_chosen"]), (record.rejected, row["moments_rejected"])):
            with Image.open(sage_dir / "train" / name) as image:
                crop = np.asarray(image.crop((2, 0, 10, 8)), np.float32) / 127.5 - 1
            mean = crop.reshape(4, 2, 4, 2, 3).mean(axis=(1, 3))
            assert (moments.shape, moments.dtype) == ((4, 4, 6), np.float16)
            np.testing.assert_allclose(moments, np.concatenate([mean, -mean], axis=-1), atol=1e-3)
    np.testing.assert_array_equal(shards.columns.unsafe, [record.unsafe for record in records])
    np.testing.assert_array_equal(shards.columns.banned, [record.banned for record in records])
    assert list(shards.columns.user_ids) == [record.user_id for record in records]


def test_what_is_said_is_true_and_on_whole_lines(sage_dir: Path, tmp_path: Path, encode, build_options, capfd):
    """TFDS says "Downloading … Unknown size" where nothing is downloaded, and draws bars of its own."""
    build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    out, err = capfd.readouterr()
    assert out == "" and not re.search("download|Unknown size|it/s|\r|\x1b", err)
    assert (
        "encoding pictures at 8 px" in err and "encoding: 56/56 pictures" in err and "writing train: 56/56 rows" in err
    )


def test_an_error_of_tfds_is_not_silenced(sage_dir: Path, tmp_path: Path, encode, build_options, monkeypatch):
    def broken(self, dl_manager):
        raise ValueError("no space left")

    before = tqdm_utils._active
    monkeypatch.setattr(builder.Sage, "_split_generators", broken)
    with pytest.raises(ValueError, match="no space left"):
        build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    assert tqdm_utils._active == before  # TFDS's bars are its user's again


def test_each_picture_is_encoded_once(sage_dir: Path, tmp_path: Path, encode, build_options):
    build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    pictures = len(list((sage_dir / "train").glob("*.jpg")))
    assert pictures == 56
    assert set(encode.batches) == {5}
    assert len(set(encode.seen)) == pictures and sum(encode.batches) == 60  # 4 fill the last batch


def test_no_profile_attribute_is_in_the_shards(shard_dir: Path):
    import tensorflow_datasets as tfds

    source = open_shards(shard_dir, "train").source
    raw = tfds.builder_from_directory(shard_dir / "sage" / "tiny_8" / "2.0.0").as_data_source(
        "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    texts = [raw[index] for index in range(len(raw))]
    texts += [path.read_bytes() for path in shard_dir.rglob("*.json")]
    assert len(source) == len(raw) == 112
    for word in (b"Islam", b"Christianity", b"healthy", b"adolescents", b"Age", b"Religion", b"depression", b"female"):
        assert not any(word in text for text in texts), word
    assert shard_dir.stat().st_mode & 0o077 == 0


def test_tfds_reads_them(shard_dir: Path):
    import tensorflow_datasets as tfds

    expected = open_shards(shard_dir, "train")[5]
    for source in (
        tfds.data_source("sage/tiny_8", data_dir=shard_dir, split="train"),
        tfds.load("sage/tiny_8", data_dir=shard_dir, split="train"),
        tfds.load("sage", data_dir=shard_dir)["train"],
    ):
        assert len(source) == 112
        assert source[5].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(source[5][name], value)
    with pytest.raises(PSAError, match="batch_size"):
        tfds.load("sage", data_dir=shard_dir, split="train", batch_size=2)
    with pytest.raises(PSAError, match="data_dir"):
        tfds.load("sage", split="train")


def test_flips_are_of_the_whole_pair(sage_dir: Path, tmp_path: Path, encode, build_options):
    plain = open_shards(build.build_shards(sage_dir, tmp_path / "one", encode=encode, **build_options), "train")
    both = build.build_shards(sage_dir, tmp_path / "two", encode=encode, **build_options, flips=True)
    row, mirrored = plain[3], open_shards(both, "train")[3]
    for name in ("moments_chosen", "moments_rejected"):
        np.testing.assert_array_equal(mirrored[name], row[name])
        # The stand-in for the VAE averages blocks, so that it commutes with mirroring.
        np.testing.assert_allclose(mirrored[f"{name}_flipped"], row[name][:, ::-1], atol=1e-3)


def test_text_embeddings_of_every_prompt(sage_dir: Path, tmp_path: Path, encode, build_options):
    calls = []

    def states(ids: np.ndarray) -> dict[str, np.ndarray]:
        calls.append(ids)
        return {"states": np.repeat(ids[:, 0, :, None], 2, axis=2) / 2.0, "pooled": ids[:, 0, :3].astype(np.float32)}

    out = build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options, text=TextCache(states, "cafe"))
    shards = open_shards(out, "train")
    distinct = {row["input_ids"].tobytes() for row in (shards[index] for index in range(len(shards)))}
    assert len(calls) == -(-(len(distinct) + 1) // 5) and {ids.shape for ids in calls} == {(5, 1, 8)}
    for index in (0, 1, 55):
        row = shards[index]
        np.testing.assert_array_equal(row["text_states"], np.repeat(row["input_ids"][:, None], 2, axis=1) / 2)
        np.testing.assert_array_equal(row["text_pooled"], row["input_ids"][:3])
    assert shards.info["text_fingerprint"] == "cafe" and shards.info["text"] == {
        "text_states": [8, 2],
        "text_pooled": [3],
    }
    empty, ids = read_empty_prompt(out), build_options["tokenizer"]([""])[0]
    assert empty.keys() == {"text_states", "text_pooled"}
    np.testing.assert_array_equal(empty["text_states"], np.repeat(ids[:, None], 2, axis=1) / 2)
    np.testing.assert_array_equal(empty["text_pooled"], ids[:3])


def test_shards_without_text_have_no_empty_prompt(shard_dir: Path):
    assert read_empty_prompt(shard_dir) is None and "text_fingerprint" not in open_shards(shard_dir, "train").info


def test_pictures_with_the_same_bytes_are_encoded_once(sage_dir: Path, tmp_path: Path, encode, build_options):
    first, *_, last = sage.read_split(sage_dir, "train")
    for name, other in ((last.chosen, first.chosen), (last.rejected, first.rejected)):
        shutil.copyfile(sage_dir / "train" / other, sage_dir / "train" / name)
    shards = open_shards(build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options), "train")
    assert (shards.info["pictures"], len(set(encode.seen))) == (54, 54)
    np.testing.assert_array_equal(shards[0]["moments_chosen"], shards[55]["moments_chosen"])


def test_shards_say_how_pictures_were_resized(sage_dir: Path, tmp_path: Path, encode, build_options):
    preprocess = Preprocess(8, resample="lanczos")
    options = build_options | {"preprocess": preprocess}
    out = build.build_shards(sage_dir, tmp_path / "out", encode=encode, **options)
    assert preprocess_of(read_info(out)) == preprocess
    info = json.loads((out / "fingerprint.json").read_text())
    (out / "fingerprint.json").write_text(json.dumps(info | {"preprocess": {"resolution": 8, "resample": "nearest"}}))
    with pytest.raises(PSAError, match="fingerprint.json: not the description of psa_jax shards"):
        read_info(out)


def test_card_and_hashes(shard_dir: Path):
    card = (shard_dir / "README.md").read_text()
    info = open_shards(shard_dir, "train").info
    assert "| train | 112 | 56 | 4 | 112 |" in card  # rows, unsafe prompts, users, pictures
    data = DatasetCard(card).data  # the Hub's own reader
    assert (data.license, data.task_categories, data.pretty_name) == (
        "other",
        ["text-to-image"],
        "SAGE as VAE moments (tiny_8)",
    )
    assert "`f00d`" in card and "licence" in card and "sage/tiny_8" in card
    assert info["pictures"] == 112
    files = {path.relative_to(shard_dir).as_posix() for path in shard_dir.rglob("*") if path.is_file()}
    assert info["files"].keys() == files - {"fingerprint.json"}
    for name, facts in info["files"].items():
        assert facts["sha256"] == hashlib.sha256((shard_dir / name).read_bytes()).hexdigest()


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from support.small_sage import BUILD, CountingEncoder, tokenize
from psa_jax.data.build import build_shards
build_shards(Path(sys.argv[1]), Path(sys.argv[2]), encode=CountingEncoder(), tokenizer=tokenize, **BUILD)
"""


def assert_same_bytes(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file()) and len(files) >= 6
    assert filecmp.cmpfiles(one, other, [str(file) for file in files], shallow=False)[1:] == ([], [])


def test_another_process_writes_the_same_bytes(sage_dir: Path, tmp_path: Path, encode, build_options):
    """Protocol buffers order the fields of a record by a hash that changes from process to process."""
    one = build.build_shards(sage_dir, tmp_path / "one", encode=encode, **build_options)
    (tmp_path / "other").mkdir()  # an empty folder is as good as none
    script = SCRIPT.format(here=str(Path(__file__).parents[1]))
    run = subprocess.run(
        [sys.executable, "-c", script, sage_dir, tmp_path / "other"], capture_output=True, text=True, check=True
    )
    assert run.stdout == ""  # stdout belongs to the results of commands
    assert_same_bytes(one, tmp_path / "other")


def test_two_tokenizers(sage_dir: Path, tmp_path: Path, encode, build_options):
    def second(captions: list[str]) -> np.ndarray:
        return np.asarray([[len(caption), 7] for caption in captions])

    options = build_options | {"tokenizer": (build_options["tokenizer"], second)}
    row = open_shards(build.build_shards(sage_dir, tmp_path / "out", encode=encode, **options), "train")[0]
    assert row["input_ids"].shape == (8,)
    assert row["input_ids_2"].tolist() == [len(row["caption"].decode()), 7]


def test_refuses_a_folder_with_something_in_it(sage_dir: Path, tmp_path: Path, encode, build_options):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    with pytest.raises(PSAError, match="not an empty folder"):
        build.build_shards(sage_dir, tmp_path / "out", encode=encode, **build_options)
    assert (tmp_path / "out" / "kept.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["truncated", "size", "encoder", "shape"])
def test_a_failed_build_makes_no_shards(sage_dir: Path, tmp_path: Path, encode, build_options, damage: str):
    path = sage_dir / "train" / sage.read_split(sage_dir, "train")[-1].chosen
    good, out = path.read_bytes(), tmp_path / "made" / "out"
    says, bad, options = path.name, encode, build_options
    if damage == "truncated":
        path.write_bytes(good[:-200])
    elif damage == "size":
        Image.new("RGB", (12, 20)).save(path)
        says = "same crop"
    elif damage == "encoder":
        says = "out of memory"

        def bad(pixels):
            raise RuntimeError("out of memory")

    else:
        options = build_options | {"latent_shape": (2, 2, 6)}
        says = "shape"
    with pytest.raises((PSAError, RuntimeError), match=says) as caught:
        build.build_shards(sage_dir, out, encode=bad, **options)
    assert isinstance(caught.value, PSAError) == (damage != "encoder")
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out.parts"]  # for going on
    assert not [path for path in out.with_name("out.parts").iterdir() if path.suffix != ".safetensors"]

    path.write_bytes(good)
    build.build_shards(sage_dir, out, encode=encode, **build_options)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert_same_bytes(out, build.build_shards(sage_dir, tmp_path / "new", encode=encode, **build_options))


def test_wrong_fingerprint_names_both(shard_dir: Path):
    with pytest.raises(PSAError, match="f00d.*beef"):
        open_shards(shard_dir, "train", expect_fingerprint="beef")


def test_damaged_shard_folders_are_refused(shard_dir: Path, tmp_path: Path):
    with pytest.raises(PSAError, match="no split 'val'"):
        open_shards(shard_dir, "val")
    with pytest.raises(PSAError, match="fingerprint.json"):
        open_shards(tmp_path, "train")
    copy = tmp_path / "copy"
    shutil.copytree(shard_dir, copy)
    assert len(open_shards(copy, "train")) == 112  # shards may be moved
    (record,) = copy.rglob("*.array_record-*")
    content = record.read_bytes()
    record.write_bytes(content[: len(content) // 2])
    with pytest.raises(PSAError, match=f"array_record.* not of {len(content)} bytes"):
        open_shards(copy, "train")
    record.unlink()
    with pytest.raises(PSAError, match="array_record.*: missing"):
        open_shards(copy, "train")
    record.write_bytes(content)
    columns = (copy / "rows-train.json").read_text()
    (copy / "rows-train.json").write_text(columns.replace('"0000007"', '"0000007x"'))
    with pytest.raises(PSAError, match="rows-train.json: .* bytes"):
        open_shards(copy, "train")
    (copy / "rows-train.json").write_text(columns)
    assert len(open_shards(copy, "train")) == 112
    info = json.loads((copy / "fingerprint.json").read_text())
    (copy / "fingerprint.json").write_text(json.dumps(info | {"splits": {"train": 111}}))
    with pytest.raises(PSAError, match="does not describe the 111 rows"):
        open_shards(copy, "train")
    (copy / "fingerprint.json").write_text(json.dumps(info | {"family": "../../etc"}))
    with pytest.raises(PSAError, match="no plain name"):
        open_shards(copy, "train")
