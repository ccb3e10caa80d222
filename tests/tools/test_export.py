"""psa-jax export as a user calls it, and what generate does with an export."""

import dataclasses
import json
import os

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from support.torch_adapters import random_adapter
from support.torch_ldm import checkpoint

from psa_jax.cli import main
from psa_jax.interop.adapter_file import read_metadata
from psa_jax.interop.diffusers import load_stable_diffusion
from psa_jax.interop.native import save_adapter
from psa_jax.models.adapter_config import AdapterConfig
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population, write_users_csv
from psa_jax.profiles.table import EmbeddingTable
from psa_jax.tools import export

FORMATS = {
    "native": ["README.md", "psa_adapter.safetensors"],
    "upstream": ["README.md", "psa_adapter.bin"],
    "ip-adapter": ["README.md", "ip_adapter.safetensors"],
}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_folder_with_a_card(run_folder, tmp_path, capsys, refused, format_):
    out = tmp_path / "out"
    assert main(["export", str(run_folder[1]), f"--format={format_}", f"--out={out}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["format"] == format_
    assert sorted(os.listdir(out)) == FORMATS[format_]
    card = (out / "README.md").read_text()
    assert FORMATS[format_][1] in card
    rates = {"native": ("| 12.3 |", "| 45.7 |"), "upstream": ("| 45.7 |", "| 12.3 |")}
    shown, hidden = rates.get(format_, rates["upstream"])
    assert shown in card and hidden not in card
    assert "exists already" in refused("export", run_folder[1], f"--format={format_}", f"--out={out}")
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_with_a_card_beside_it_that_overwrites_nothing(run_folder, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert main(["export", str(run_folder[1]), f"--out={tmp_path / 'a.safetensors'}"]) == 0
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "a.safetensors" in (tmp_path / "a.README.md").read_text()
    assert (tmp_path / "a.safetensors").read_bytes() == (run_folder[1] / "psa_adapter.safetensors").read_bytes()


@pytest.mark.parametrize("link", [False, True])
def test_no_card_is_replaced_and_a_refusal_leaves_nothing(run_folder, tmp_path, refused, link):
    (tmp_path / "README.md").write_text("mine")
    if link:
        (tmp_path / "e1.README.md").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "e1.README.md").write_text("mine, too")
    before = sorted(os.listdir(tmp_path))
    error = refused("export", run_folder[1], f"--out={tmp_path / 'e1.safetensors'}")
    assert "e1.README.md: exists already" in error and "give another --out, or move it away" in error
    assert sorted(os.listdir(tmp_path)) == before and not (tmp_path / "nowhere").exists()
    assert main(["export", str(run_folder[1]), f"--out={tmp_path / 'e2.safetensors'}"]) == 0  # the advice works
    (tmp_path / "e1.README.md").rename(tmp_path / "away.md")
    assert main(["export", str(run_folder[1]), f"--out={tmp_path / 'e1.safetensors'}"]) == 0


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002], ids=oct)
@pytest.mark.parametrize("format_", sorted(export.FORMATS.keys() - {"gates"}))  # for adapters of another kind
def test_who_may_read_an_export(run_folder, tmp_path, format_, umask):
    """A model with one user in it is its owner's, all of it; what tells about nobody is whosever the umask lets."""
    model, folder = run_folder
    words = ["export", str(folder), f"--format={format_}", f"--out={tmp_path / 'out'}"]
    if format_ in ("baked", "diffusers"):
        words.append(f"--model={model}")
    if format_ == "baked":
        words += [f"--table={folder / 'table.safetensors'}", "--user=0000002"]
    before = os.umask(umask)
    try:
        assert main(words) == 0
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    hidden = 0o077 if format_ == "baked" else umask
    found = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert {0o777 & ~hidden} == {mode for path, mode in found.items() if path.is_dir()}
    assert {0o666 & ~hidden} == {mode for path, mode in found.items() if path.is_file()}


def test_a_baked_folder_and_a_whole_one_open_in_diffusers(run_folder, tmp_path, refused):
    model, folder = run_folder
    baked, whole = tmp_path / "baked", tmp_path / "whole"
    words = ["export", folder, f"--model={model}"]
    table = [f"--table={folder / 'table.safetensors'}", "--user=0000002"]
    assert main([*map(str, words), "--format=baked", *table, f"--out={baked}"]) == 0
    assert main([*map(str, words), "--format=diffusers", f"--out={whole}"]) == 0
    base = StableDiffusionPipeline.from_pretrained(model, local_files_only=True).unet.state_dict()
    for out in (baked, whole):
        unet = StableDiffusionPipeline.from_pretrained(out, local_files_only=True).unet.state_dict()
        changed = {name for name, tensor in unet.items() if not torch.equal(tensor, base[name])}
        expected = {name for name in base if name.endswith("attn2.to_out.0.bias")} if out is baked else set()
        assert changed == expected
    assert (whole / "psa_adapter.safetensors").read_bytes() == (folder / "psa_adapter.safetensors").read_bytes()
    assert "needs a user" in refused(*words, "--format=baked", f"--out={tmp_path / 'x'}")
    assert "needs --model" in refused("export", folder, "--format=diffusers", f"--out={tmp_path / 'x'}")
    other = refused("export", folder, "--model=tiny", "--format=diffusers", f"--out={tmp_path / 'x'}")
    assert "another base model" in other
    assert sorted(os.listdir(tmp_path)) == ["baked", "whole"]


@pytest.mark.parametrize(
    ("format_", "kind", "tokens", "says"),
    [
        ("ip-adapter", "text", 4, "load_psa"),
        ("upstream", "published", 4, "reads 1 token"),
        ("upstream", "prompt", 1, "cannot express kind 'prompt'"),
    ],
)
def test_what_a_format_cannot_express_is_said_and_nothing_is_left(tmp_path, refused, format_, kind, tokens, says):
    path = tmp_path / "a.safetensors"
    save_adapter(random_adapter(AdapterConfig(kind, tokens, 7, 20, ((16, 2),))), path, {})
    assert says in refused("export", path, f"--format={format_}", f"--out={tmp_path / 'out'}")
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_an_export_of_what_is_not_finite(run_folder, tmp_path, refused):
    tensors = safetensors.torch.load_file(run_folder[1] / "psa_adapter.safetensors")
    tensors["user_proj.norm.bias"][0] = float("nan")
    about = json.dumps({**read_metadata(run_folder[1] / "psa_adapter.safetensors"), "format": "psa_jax.adapter/1"})
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"psa": about})
    for format_ in FORMATS:
        error = refused("export", tmp_path / "a.safetensors", f"--format={format_}", f"--out={tmp_path / 'x'}")
        assert "user_proj.norm.bias has values that are not finite" in error


def test_a_report_is_of_the_adapter_that_is_exported(run_folder, tmp_path, refused):
    report = json.loads((run_folder[1] / "report.json").read_text())
    tensors = safetensors.torch.load_file(run_folder[1] / "psa_adapter.safetensors")
    about = json.dumps({**read_metadata(run_folder[1] / "psa_adapter.safetensors"), "format": "psa_jax.adapter/1"})
    tensors["user_proj.norm.bias"][0] += 1e-6
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors", {"psa": about})
    words = (f"--report={run_folder[1] / 'report.json'}", f"--out={tmp_path / 'out'}")
    error = refused("export", tmp_path / "other.safetensors", *words)
    assert "judged another adapter" in error and "leave --report out" in error
    del report["adapter"]["sha256"]
    (tmp_path / "old.json").write_text(json.dumps(report))
    words = (run_folder[1], f"--report={tmp_path / 'old.json'}", f"--out={tmp_path / 'out'}")
    assert "does not say which adapter it judged" in refused("export", *words)
    assert not (tmp_path / "out").exists()
    # The advice works, and what was exported and imported again is the same adapter.
    assert main(["export", str(tmp_path / "other.safetensors"), f"--out={tmp_path / 'out'}"]) == 0
    again = tmp_path / "again.safetensors"
    words = [str(run_folder[1] / "psa_adapter.safetensors"), f"--model={run_folder[0]}", f"--out={again}"]
    assert main(["import", *words]) == 0
    report = f"--report={run_folder[1] / 'report.json'}"
    assert main(["export", str(again), report, f"--out={tmp_path / 'card'}"]) == 0
    assert "| 12.3 |" in (tmp_path / "card" / "README.md").read_text()


def test_a_base_model_in_a_single_file(sd1, tmp_path):
    """The same weights as the folder's, so the same base model: exported whole, and imported for."""
    folder, single, model = tmp_path / "run", tmp_path / "model.safetensors", load_stable_diffusion(sd1[0])
    config = AdapterConfig.for_unet(model.unet.config, user_dim=33, kind="published", tokens=1)
    save_adapter(random_adapter(config), folder / "psa_adapter.safetensors", {"base_model": model.base_hash})
    tensors = {name: tensor.clone() for name, tensor in checkpoint(sd1[1]).items()}
    safetensors.torch.save_file(tensors, single)
    base = [f"--model={single}", f"--model-config={sd1[0]}", f"--tokenizer={sd1[0] / 'tokenizer'}"]
    assert main(["export", str(folder), "--format=diffusers", *base, f"--out={tmp_path / 'whole'}"]) == 0
    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "whole", local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(sd1[1], part).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in getattr(ours, part).state_dict().items())
    assert ours.tokenizer(["a cat"])["input_ids"] == sd1[1].tokenizer(["a cat"])["input_ids"]
    adapter, out = folder / "psa_adapter.safetensors", tmp_path / "again.safetensors"
    assert main(["import", str(adapter), *base, f"--out={out}"]) == 0
    assert out.read_bytes() == adapter.read_bytes()


def test_a_baked_card_has_no_rates_of_another_way(run_folder, tmp_path):
    model, folder = run_folder
    words = [f"--model={model}", "--format=baked", f"--table={folder / 'table.safetensors'}", "--user=0000002"]
    assert main(["export", str(folder), *words, f"--out={tmp_path / 'baked'}"]) == 0
    card = (tmp_path / "baked" / "README.md").read_text()
    assert "Not measured in this way (the unconditional side of guidance: `same`)" in card
    assert "12.3" not in card and "45.7" not in card


def test_the_width_that_the_original_needs_is_said(run_folder, tmp_path, capsys):
    assert main(["export", str(run_folder[1]), "--format=upstream", f"--out={tmp_path / 'out'}"]) == 0
    dim = get_encoder("features").dim
    for said in (capsys.readouterr().err, (tmp_path / "out" / "README.md").read_text()):
        assert "its own width, 3584 numbers" in said and f"takes {dim}" in said


def test_what_is_given_for_an_adapter(run_folder, tmp_path, refused):
    """Its folder; the folder above; an IP-Adapter."""
    model, folder = run_folder
    draw = ["generate", f"--model={model}", "--prompt=a cat", "--steps=1", f"--out={tmp_path / 'drawn'}"]
    user = [f"--table={folder / 'table.safetensors'}", "--user=0000002"]
    assert main([*draw, f"--adapter={folder}", *user]) == 0
    os.symlink(folder, tmp_path / "run")
    error = refused(*draw, f"--adapter={tmp_path}", *user)
    assert f"give {tmp_path / 'run'}" in error
    assert main(["export", str(folder), "--format=ip-adapter", f"--out={tmp_path / 'ip'}"]) == 0
    ip = tmp_path / "ip" / "ip_adapter.safetensors"
    error = refused("import", ip, f"--model={model}", f"--out={tmp_path / 'x.safetensors'}")
    assert "an IP-Adapter, which stock diffusers loads" in error and "version" not in error


FOLDERS = ["native", "diffusers", "upstream", "ip-adapter", "baked"]


@pytest.mark.parametrize("format_", FOLDERS)
def test_every_exported_folder_is_drawn_with_or_says_what_to_do(run_folder, tmp_path, refused, format_):
    """`generate --adapter=FOLDER`; for a folder of another format, what the error tells to do ends in a picture."""
    model, folder = run_folder
    user = [f"--table={folder / 'table.safetensors'}", "--user=0000002"]
    words = [f"--format={format_}", f"--out={tmp_path / 'out'}", *(user if format_ == "baked" else [])]
    words += [f"--model={model}"] if format_ in ("baked", "diffusers") else []
    assert main(["export", str(folder), *words]) == 0
    draw = ["generate", "--prompt=a cat", "--steps=1", f"--out={tmp_path / 'drawn'}"]
    ours, theirs, made = f"--model={model}", f"--adapter={tmp_path / 'out'}", tmp_path / "made.safetensors"
    if format_ in ("native", "diffusers"):
        assert main([*draw, ours, theirs, *user]) == 0
        return
    error = refused(*draw, ours, theirs, *user)
    if format_ == "upstream":
        command = f"psa-jax import {tmp_path / 'out' / 'psa_adapter.bin'} --model=DIR --out=FILE"
        assert command in error
        assert main(command.replace("DIR", str(model)).replace("FILE", str(made)).split()[1:]) == 0
        assert main([*draw, ours, f"--adapter={made}", *user]) == 0
    elif format_ == "ip-adapter":
        assert "an IP-Adapter, which stock diffusers loads" in error and "the run that it was exported from" in error
        assert main([*draw, ours, f"--adapter={folder}", *user]) == 0
    else:
        assert "use it as --model, without --adapter" in error
        assert main([*draw, f"--model={tmp_path / 'out'}"]) == 0


def test_a_user_who_is_not_in_the_table_is_added_as_the_error_says(run_folder, tmp_path, refused):
    model, folder = run_folder
    (tmp_path / "table").write_bytes((folder / "table.safetensors").read_bytes())
    write_users_csv(tmp_path / "users.csv", sample_population(4)[3:])
    words = [f"--model={model}", "--prompt=a cat", "--steps=1", f"--adapter={folder}", f"--out={tmp_path / 'out'}"]
    words = ["generate", *words, f"--table={tmp_path / 'table'}", "--user=0000004"]
    command = "psa-jax encode USERS --add --out=TABLE"
    assert command in refused(*words)
    command = command.replace("USERS", str(tmp_path / "users.csv")).replace("TABLE", str(tmp_path / "table"))
    assert main(command.split()[1:]) == 0
    assert main(words) == 0


def test_a_profile_for_an_adapter_of_another_encoder(run_folder, tmp_path, refused):
    """What the error tells to give draws."""
    model, folder = run_folder
    table = EmbeddingTable.load(folder / "table.safetensors")
    dataclasses.replace(table, encoder="qwen", fingerprint="qwen-1").save(tmp_path / "table.safetensors")
    about = read_metadata(folder / "psa_adapter.safetensors") | {"encoder": "qwen", "encoder_fingerprint": "qwen-1"}
    config = AdapterConfig("published", 1, table.dim, about["cross_dim"], tuple(map(tuple, about["layers"])))
    save_adapter(random_adapter(config), tmp_path / "psa_adapter.safetensors", about)
    words = ["generate", f"--model={model}", "--prompt=a cat", "--steps=1", f"--adapter={tmp_path}"]
    words.append(f"--out={tmp_path / 'out'}")
    error = refused(*words, '--profile={"age": 9, "gender": "female"}')
    assert "'qwen', which --profile cannot run; give --user ID with --table FILE" in error
    assert main([*words, "--user=0000002", f"--table={tmp_path / 'table.safetensors'}"]) == 0


@pytest.mark.parametrize("standardised", [False, True])
def test_a_table_of_another_scale_than_the_training_s(run_folder, tmp_path, refused, standardised):
    """`generate` and a baked export refuse what `load_psa` refuses."""
    model, folder = run_folder
    about = read_metadata(folder / "psa_adapter.safetensors") | {"standardised": standardised}
    table = EmbeddingTable.load(folder / "table.safetensors")
    config = AdapterConfig("published", 1, table.dim, about["cross_dim"], tuple(map(tuple, about["layers"])))
    save_adapter(random_adapter(config), tmp_path / "psa_adapter.safetensors", about)
    tables = {False: tmp_path / "raw.safetensors", True: tmp_path / "scaled.safetensors"}
    table.save(tables[False])
    table.standardised().save(tables[True])
    draw = ["generate", f"--model={model}", "--prompt=a cat", "--steps=1", f"--adapter={tmp_path}"]
    bake = ["export", tmp_path, "--format=baked", f"--model={model}"]
    message = "only one of adapter and table is standardised; give the table of its training"
    for who in ("--user=0000002", '--profile={"age": 9, "gender": "female"}'):
        for words in (draw, bake):
            out = f"--out={tmp_path / 'out'}"
            assert message in refused(*words, who, f"--table={tables[not standardised]}", out)
    assert main([*draw, f"--table={tables[standardised]}", "--user=0000002", f"--out={tmp_path / 'drawn'}"]) == 0


def test_an_id_without_its_zeros(run_folder, tmp_path, refused):
    model, folder = run_folder
    words = [f"--model={model}", "--prompt=a cat", "--steps=1", f"--adapter={folder}", f"--out={tmp_path / 'out'}"]
    words += [f"--table={folder / 'table.safetensors'}"]
    assert refused("generate", *words, "--user=2").endswith("give 0000002\n")
    assert main(["generate", *words, "--user=0000002"]) == 0


def test_flags_that_another_format_has_are_not_taken_in_silence(run_folder, tmp_path, refused):
    for words in (["--scale=0.5"], ["--user=0000002"], ['--profile={"age": 9}'], ["--table=x"]):
        error = refused("export", run_folder[1], *words, f"--out={tmp_path / 'out'}")
        assert "are for --format=baked" in error


def test_the_card_carries_what_was_stated_and_no_path_of_this_machine(run_folder, tmp_path, refused):
    model, folder = run_folder
    stated = ["--license=creativeml-openrail-m", "--base-model=stable-diffusion-v1-5/stable-diffusion-v1-5"]
    for format_ in ("native", "diffusers"):
        out = tmp_path / format_
        assert main(["export", str(folder), f"--format={format_}", f"--model={model}", *stated, f"--out={out}"]) == 0
        card = ModelCard.load(out / "README.md")
        assert card.data.license == "creativeml-openrail-m"
        assert card.data.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"
        assert str(tmp_path) not in card.content and str(model) not in card.content and str(folder) not in card.content
    assert main(["export", str(folder), f"--out={tmp_path / 'silent'}"]) == 0
    silent = ModelCard.load(tmp_path / "silent" / "README.md")
    assert (silent.data.license, silent.data.base_model) == ("unknown", None)
    error = refused("export", folder, f"--base-model={model}", f"--out={tmp_path / 'x'}")
    assert "is no id of a model on the Hugging Face Hub; give ORG/NAME" in error
    error = refused("export", folder, "--license=Apache License", f"--out={tmp_path / 'x'}")
    assert "is no licence that the Hugging Face Hub knows; give" in error


def test_the_embedded_model_is_not_on_the_hub(run_folder, tmp_path, refused):
    words = ["--model=tiny", "--base-model=a/b", f"--out={tmp_path / 'x'}"]
    assert "leave --base-model out" in refused("export", run_folder[1], *words)
