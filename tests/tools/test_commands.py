"""generate, export and import as a user calls them, and what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from psa_jax.cli import main
from psa_jax.interop.diffusers import weights_hash
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter import Adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.table import EmbeddingTable

PROFILE = '{"age": 9, "gender": "female", "religion": "Islam"}'


@pytest.fixture(scope="module")
def files(small_pipeline, tmp_path_factory):
    """Model folder, an adapter with something to say, and a table of five users."""
    folder, model = tmp_path_factory.mktemp("files"), small_pipeline[1]
    encoder = get_encoder("features")
    adapter = Adapter(AdapterConfig.for_unet(model.unet.config, user_dim=encoder.dim), rngs=nnx.Rngs(0))
    for layer in adapter.layers:
        layer.to_v[...] = 0.3 * np.random.default_rng(0).normal(size=layer.to_v.shape).astype(np.float32)
    metadata = {
        "base_model": weights_hash(model.folder),
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "steps": 3,
    }
    save_adapter(adapter, folder / "adapter.safetensors", metadata)
    EmbeddingTable.from_profiles(sample_population(5), encoder).save(folder / "table.safetensors")
    return model.folder, folder


def generate(files, out, *words: str) -> int:
    model, _ = files
    return main(["generate", f"--model={model}", "--prompt=a cat", "--steps=2", f"--out={out}", *words])


def picture(folder):
    (path,) = folder.glob("*.png")
    return Image.open(path)


def test_generate_for_a_profile_and_without(files, tmp_path, capsys):
    adapter = f"--adapter={files[1] / 'adapter.safetensors'}"
    assert generate(files, tmp_path / "base") == 0
    assert generate(files, tmp_path / "child", adapter, f"--profile={PROFILE}") == 0
    assert generate(files, tmp_path / "off", adapter, f"--profile={PROFILE}", "--scale=0") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"]
    base, child, off = (np.asarray(picture(tmp_path / name)).astype(int) for name in ("base", "child", "off"))
    assert np.abs(base - off).max() <= 1  # scale 0 is the base model
    assert np.abs(base - child).max() > 3
    shown = picture(tmp_path / "child")
    about = json.loads(shown.text["psa_jax"])
    assert about["prompt"] == "a cat"
    assert about["seed"] == 0
    assert not {"9", "female", "Islam"} & set(str(shown.text).replace('"', " ").split())


def test_generate_for_a_user_of_a_table(files, tmp_path):
    words = [f"--adapter={files[1] / 'adapter.safetensors'}", f"--table={files[1] / 'table.safetensors'}"]
    assert generate(files, tmp_path / "one", *words, "--user=0000001") == 0
    assert generate(files, tmp_path / "five", *words, "--user=0000005") == 0
    one, five = (np.asarray(picture(tmp_path / name)).astype(int) for name in ("one", "five"))
    assert np.abs(one - five).max() > 0


def test_prompts_of_a_file_and_a_stopped_run_that_goes_on(files, tmp_path, capsys):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text('prompt,negative,seed\n"a cat, at last",,7\ncat,at,\n')
    out = tmp_path / "out"
    words = [f"--prompts={prompts}", "--images=2", "--seed=3"]
    assert generate(files, out, *words) == 0
    names = ["00000_3.png", "00000_4.png", "00001_7.png", "00001_8.png", "00002_3.png", "00002_4.png"]
    assert sorted(path.name for path in out.glob("*.png")) == names
    before = {name: (out / name).read_bytes() for name in names}
    about = json.loads(Image.open(out / "00002_3.png").text["psa_jax"])
    assert (about["prompt"], about["negative"], about["sampler"]) == ("cat", "at", "ddim")

    (out / names[1]).unlink()
    (out / names[4]).write_bytes(before[names[4]][:100])  # cut short
    capsys.readouterr()
    assert generate(files, out, *words) == 0
    out_, err = capsys.readouterr()
    assert json.loads(out_.splitlines()[-1])["drawn"] == 2
    assert "generating 2 of 6 pictures" in err and "generating: 2/2 pictures" in err
    assert {name: (out / name).read_bytes() for name in names} == before

    assert generate(files, out, *words, "--guidance=3") == 1
    assert "holds pictures of other settings (guidance)" in capsys.readouterr().err
    prompts.write_text("prompt,seed\nanother,7\n")
    assert generate(files, out, f"--prompts={prompts}", "--images=2", "--seed=3") == 1
    assert "is a picture of another prompt or seed" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in names} == before


def test_a_folder_holds_the_pictures_of_one_user(files, tmp_path, capsys):
    adapter = f"--adapter={files[1] / 'adapter.safetensors'}"
    assert generate(files, tmp_path / "out", adapter, f"--profile={PROFILE}") == 0
    assert generate(files, tmp_path / "out", adapter, '--profile={"age": 40, "gender": "male"}') == 1
    assert "other settings (user)" in capsys.readouterr().err
    (settings,) = tmp_path.glob("out/.settings.json")
    assert settings.stat().st_mode & 0o777 == 0o600
    assert not {"female", "Islam"} & set(settings.read_text().replace('"', " ").split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter=ADAPTER"], "needs a user"),
        (["--profile={}"], "need --adapter"),
        (["--scale=0.5"], "need --adapter"),
        (["--unconditional=same"], "need --adapter"),
        (["--adapter=ADAPTER", "--user=0000001"], "--user needs --table"),
        (["--adapter=ADAPTER", "--table=TABLE", "--user=0000099"], "0000099"),
        (["--adapter=ADAPTER", "--table=TABLE", "--user=" + "9" * 5000], f"user '{'9' * 79}… is not in the embedding"),
        (["--adapter=ADAPTER", '--profile={"age": 9, "gender": "robot"}'], "gender"),
        (["--adapter=missing.safetensors", "--profile={}"], "no such adapter"),
        (["--model=missing"], "no such model folder"),
        (["--sld=max", "--adapter=ADAPTER", f"--profile={PROFILE}"], "leave out the adapter, or sld"),
        (["--sld=max", "--guidance=1"], "give guidance above 1"),
        (["--sld-concept=blood"], "needs --sld, such as --sld=strong"),
        (["--sld=max", "--sld-concept= "], "is a text that says something"),
        (["--size=63"], "picture size"),
        (["--steps=0"], "--steps: '0' does not fit; give a whole number from 1 to 2147483647"),
        (["--images=0"], "--images: '0' does not fit; give a whole number from 1 to 2147483647"),
        (["--sampler=magic"], "invalid choice"),
        (["--eta=0.5", "--sampler=euler"], "eta is DDIM's"),
        (["--prompts=EMPTY"], "columns"),
        (["--prompts=missing.csv"], "missing.csv"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(files, tmp_path, capsys, words, message):
    places = {"ADAPTER": str(files[1] / "adapter.safetensors"), "TABLE": str(files[1] / "table.safetensors")}
    places["EMPTY"] = str(tmp_path / "empty.csv")
    (tmp_path / "empty.csv").write_text("text\na cat\n")
    for short, path in places.items():
        words = [word.replace(short, path) for word in words]
    assert generate(files, tmp_path / "out", *words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("profile", ['{"age": 9, "gender": "SECRET"}', '{"age": 9, "SECRET": 1}', '{"SECRET', "SECRET"])
def test_no_value_of_a_profile_is_in_an_error(files, tmp_path, capsys, profile):
    assert generate(files, tmp_path, f"--adapter={files[1] / 'adapter.safetensors'}", f"--profile={profile}") == 1
    error = capsys.readouterr().err
    assert "profile: " in error and error.count("\n") == 1 and "SECRET" not in error


def changed(path):
    """The same tensors, one of them with other numbers."""
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].size)
    save_file(tensors | {name: tensors[name] + np.float32(0.5)}, path, metadata)


def test_a_run_goes_on_with_the_same_contents_only(small_pipeline, files, tmp_path, monkeypatch, capsys):
    """Paths may be spelled otherwise and files moved; other weights under the old path are another run's."""
    shutil.copytree(files[0], tmp_path / "model")
    shutil.copytree(files[0] / "vae", tmp_path / "vae")
    shutil.copy(files[1] / "adapter.safetensors", tmp_path / "adapter.safetensors")
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    width = small_pipeline[1].unet.config.block_out_channels[0]
    lora = {f"{layer}.lora_A.weight": np.ones((1, width)), f"{layer}.lora_B.weight": np.ones((width, 1))}
    save_file({name: array.astype(np.float32) for name, array in lora.items()}, tmp_path / "lora.safetensors")
    monkeypatch.chdir(tmp_path)

    def draw(model="model", vae="vae", lora="lora.safetensors", adapter="adapter.safetensors") -> int:
        words = [f"--vae={vae}", f"--lora={lora}", "--lora-scale=0.1", f"--adapter={adapter}", f"--profile={PROFILE}"]
        return main(["generate", f"--model={model}", "--prompt=a cat", "--steps=2", "--out=out", *words])

    assert draw() == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    shutil.copy("adapter.safetensors", "again.safetensors")
    shutil.copy("lora.safetensors", "lora2.safetensors")
    for words in (
        {"model": "./vae/../model", "adapter": tmp_path / "adapter.safetensors"},
        {"vae": "model/vae", "lora": "lora2.safetensors", "adapter": "again.safetensors"},
    ):
        capsys.readouterr()
        assert draw(**words) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["drawn"] == 0
    for name, file in (
        ("adapter", "adapter.safetensors"),
        ("lora", "lora.safetensors"),
        ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("model", "model/unet/diffusion_pytorch_model.safetensors"),
        ("model_config", "model/scheduler/scheduler_config.json"),
    ):
        whole = Path(file).read_bytes()
        if name == "model_config":
            Path(file).write_text(json.dumps(json.loads(whole) | {"beta_end": 0.013}))
        else:
            changed(file)
        if name == "model":  # an adapter is of one base model: what says so is left out
            about = {"encoder": "features", "encoder_fingerprint": get_encoder("features").fingerprint}
            monkeypatch.setattr("psa_jax.tools.generate.read_metadata", lambda path, about=about: about)
        assert draw() == 1
        assert f"out: holds pictures of other settings ({name}); give another --out" in capsys.readouterr().err
        Path(file).write_bytes(whole)
    settings = Path("out/.settings.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"adapter": "adapter.safetensors"}))  # as once
    assert draw() == 1
    assert "other settings (adapter)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("out").glob("*.png")}.items() <= before.items()


def test_a_picture_that_is_not_finite_is_never_written(files, tmp_path, capsys):
    words = (f"--adapter={files[1] / 'adapter.safetensors'}", f"--profile={PROFILE}")
    assert generate(files, tmp_path / "out", *words, "--scale=1e38") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a picture is not finite and was not made" in error and "a smaller --scale" in error
    assert not list(tmp_path.rglob("*.png"))
    assert generate(files, tmp_path / "again", *words, "--scale=1") == 0  # the advice works


def test_export_and_import_are_bit_equal(files, tmp_path, capsys):
    model, folder = files
    assert main(["export", str(folder / "adapter.safetensors"), f"--out={tmp_path / 'out.safetensors'}"]) == 0
    back = tmp_path / "back.safetensors"
    assert main(["import", str(tmp_path / "out.safetensors"), f"--model={model}", f"--out={back}"]) == 0
    assert (folder / "adapter.safetensors").read_bytes() == back.read_bytes()
    assert main(["import", str(tmp_path / "out.safetensors"), f"--model={model}", f"--out={back}"]) == 1
    assert "exists already" in capsys.readouterr().err
