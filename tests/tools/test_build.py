"""`psa-jax build` on small pipelines of diffusers: moments and text embeddings equal those of diffusers."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from psa_jax.data.shards import open_shards
from psa_jax.errors import PSAError
from psa_jax.mini.dataset import render_mini
from psa_jax.tools import build


@pytest.fixture(scope="module")
def sage_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini") / "sage"
    render_mini(folder, 1, 0)
    for split in ("val", "test_seen", "test_unseen"):
        (folder / split).rename(folder.parent / split)
    return folder


def options(model: Path, sage_dir: Path, out: Path, **changes) -> Namespace:
    given = {"resolution": 16, "flips": True, "text_embeddings": True, "batch_size": 8, "threads": 2}
    return Namespace(sage_dir=sage_dir, model=str(model), out=out, **(given | {"host": None, "hosts": None} | changes))


def test_sdxl_equals_diffusers(sdxl, sage_dir: Path, tmp_path: Path, capsys):
    torch = pytest.importorskip("torch")
    model, theirs = sdxl
    assert build.run(options(model, sage_dir, tmp_path / "out")) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["config"] == "sdxl_16" and printed["splits"] == {"train": 42}
    row = open_shards(tmp_path / "out", "train", printed["fingerprint"])[5]
    record = json.loads((sage_dir / "train" / "metadata.jsonl").read_text().splitlines()[5])
    assert row["original_size"].tolist() == [64, 64]
    with torch.no_grad():
        for name in ("chosen", "rejected"):
            with Image.open(sage_dir / "train" / record[name]) as image:
                pixels = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
            for suffix, view in (("", pixels), ("_flipped", pixels[:, ::-1])):
                images = torch.from_numpy(view.copy()).permute(2, 0, 1)[None]
                expected = theirs.vae.encode(images).latent_dist.parameters[0].permute(1, 2, 0).numpy()
                np.testing.assert_allclose(row[f"moments_{name}{suffix}"], expected, atol=2e-3, rtol=2e-3)
        states, _, pooled, _ = theirs.encode_prompt(record["caption"], do_classifier_free_guidance=False)
    np.testing.assert_allclose(row["text_states"], states[0].numpy(), atol=3e-3, rtol=2e-3)
    np.testing.assert_allclose(row["text_pooled"], pooled[0].numpy(), atol=3e-3, rtol=2e-3)
    for name, tokenizer in (("input_ids", theirs.tokenizer), ("input_ids_2", theirs.tokenizer_2)):
        ids = tokenizer(record["caption"], padding="max_length", truncation=True)["input_ids"]
        assert row[name].tolist() == ids
    assert row["input_ids"].tolist() != row["input_ids_2"].tolist()  # they pad otherwise


def test_hosts_and_then_all(sd1, sage_dir: Path, tmp_path: Path, capsys):
    model, _ = sd1
    plain = {"flips": False, "text_embeddings": False}
    for host in (0, 1):
        assert build.run(options(model, sage_dir, tmp_path / "out", host=host, hosts=2, **plain)) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["parts"] == str(tmp_path / "out.parts")
        assert "before the first is encoded" in err
    assert build.run(options(model, sage_dir, tmp_path / "out", **plain)) == 0
    shards = open_shards(tmp_path / "out", "train")
    assert (len(shards), shards.info["family"], shards.info["resolution"]) == (42, "sd1", 16)
    assert not {"moments_chosen_flipped", "text_states", "input_ids_2"} & shards[0].keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"host": 0}, "belong together"), ({"resolution": 15}, "no multiple of 2"), ({"batch_size": 9}, "8 devices")],
)
def test_bad_options(sd1, sage_dir: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(PSAError, match=message):
        build.run(options(sd1[0], sage_dir, tmp_path / "out", **changes))
    assert not list(tmp_path.iterdir())
