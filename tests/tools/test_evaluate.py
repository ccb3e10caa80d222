"""`psa-jax evaluate`: from a list of prompts to pictures of many users, to judged pictures, as a user calls them."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.chat_server import ChatServer
from support.clip_folders import save_clip
from support.small_sage import BANS, write_sage
from support.torch_inception import SMALLEST, published, random_inception

from psa_jax.cli import main
from psa_jax.evaluation import inception_embeddings
from psa_jax.evaluation.manifest import Pictured, read_manifest, write_manifest
from psa_jax.mini.world import CONCEPTS, Scene, render
from psa_jax.tools import evaluate, evaluate_verdicts

ROOT = Path(__file__).resolve().parents[2]
USERS = ("0000001", "0000002", "0000003", "0000004")


def drawn(folder: Path, method: str, personal: bool, count: int = 6) -> Path:
    """Pictures of the small world as a perfect method draws them, or as one that knows no users does."""
    folder.mkdir()
    listed = []
    for index in range(count):
        concept = CONCEPTS[index % len(CONCEPTS)]
        for number, user in enumerate(USERS):
            banned = (index + number) % 2 == 0
            scene = Scene("night", "cat", concept.benign if personal and banned else concept.name, index)
            name = f"{index}_{user}.png" if personal else f"{index}.png"
            Image.fromarray(np.asarray(render(scene))).save(folder / name)
            listed.append(
                Pictured(
                    name, method, f"p{index}", index, "a cat", user, concept.category, True, banned, "unseen", "L2"
                )
            )
    write_manifest(folder, listed)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return [str(drawn(root / "base", "base", False)), str(drawn(root / "psa", "psa", True))]


def test_methods_are_judged_and_compared(folders, tmp_path, capsys):
    assert main(["evaluate", *folders, "--with=oracle,nudenet", f"--out={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    methods = result["judges"]["oracle"]["methods"]
    rates = {name: each["rates"] for name, each in methods.items()}
    assert [rates["psa"][name][0] for name in ("suppression", "retention", "selectivity", "clean")] == [100.0] * 4
    assert rates["base"]["selectivity"][0] == 0.0 and rates["base"]["retention"][0] == 100.0
    assert methods["psa"]["users"] == {user: {"banned": 3, "shown": 0, "allowed": 3, "missing": 0} for user in USERS}
    assert methods["psa"]["slices"].keys() == {"category", "level", "group"}
    compared = result["judges"]["oracle"]["differences"]["psa"]
    assert compared["suppression"]["by_users"]["difference"][0] == 100.0 and compared["retention"]["only_ours"] == 0
    assert "psa less base, suppression: 100.0 (100.0 to 100.0) by 4 users" in printed
    assert json.loads(printed.splitlines()[-1])["result"] == str(tmp_path / "out" / "result.json")
    # Who bans what is in the result, which is its owner's alone, and not on the screen.
    assert not [user for user in USERS if user in printed]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o600}
    # A judge sees its categories alone; what it does not see is no suppression.
    assert result["judges"]["nudenet"]["sees"] == ["Sexuality"]
    counted = [each["rates"] for each in result["judges"]["nudenet"]["methods"].values()]
    sexual = sum(CONCEPTS[index].category == "Sexuality" for index in range(6)) * len(USERS)
    assert [each["banned"] + each["allowed"] if each else 0 for each in counted] == [sexual] * 2


def test_hosts_share_the_pictures(folders, tmp_path, capsys, refused):
    """Parts first, then a call that finds them: the result of one host, to the byte."""
    words = ["evaluate", *folders, "--with=oracle,nudenet"]
    assert main([*words, f"--out={tmp_path / 'one'}"]) == 0
    capsys.readouterr()
    for host in (0, 1):
        assert main([*words, f"--out={tmp_path / 'two'}", f"--host={host}", "--hosts=2"]) == 0
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert last["hosts"] == 2 and set(last["verdicts"]) == {"oracle", "nudenet"}
    assert not (tmp_path / "two" / "result.json").exists()
    assert main([*words, f"--out={tmp_path / 'two'}"]) == 0
    results = [(tmp_path / name / "result.json").read_bytes() for name in ("one", "two")]
    assert results[0] == results[1]
    assert (tmp_path / "two" / "oracle.jsonl").read_text().count("\n") == 1  # nothing was left for the last call
    said = refused(*words, f"--out={tmp_path / 'three'}", "--host=2", "--hosts=2")
    assert "--host=2 of --hosts=2: count from 0" in said
    said = refused("evaluate", *folders, "--with=cmmd", f"--out={tmp_path / 'three'}", "--host=0", "--hosts=2")
    assert "cmmd is of all pictures together; leave it to the last call" in said


def shown_in(folders: list[str]) -> dict[bytes, str]:
    """Pixels of each picture → the category that it shows, or "" for none."""
    found = {}
    for folder in map(Path, folders):
        for each in read_manifest(folder):
            pixels = np.asarray(Image.open(folder / each.file)).tobytes()
            found[pixels] = "" if each.method == "psa" and each.banned else each.category
    return found


def test_pairs_are_compared(folders, tmp_path, capsys, monkeypatch, refused):
    """A model that minds what the user bans and nothing else; the page says who won."""
    shown = shown_in(folders)

    def answer(pictures: list[np.ndarray], text: str) -> dict:
        first, second = (bool(shown[each.tobytes()]) and shown[each.tobytes()] in text for each in pictures)
        return {"better": "same" if first == second else "B" if first else "A"}

    with ChatServer(answer, []).running() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        words = ["evaluate", *folders, "--with=judge-pairs", "--judge-model=looker", "--requests=24"]
        assert main([*words, f"--out={tmp_path / 'out'}"]) == 0
        printed = capsys.readouterr().out
        both = ["--with=judge,judge-pairs", "--judge-model=looker", f"--out={tmp_path / 'both'}"]
        assert "one budget of --requests" in refused("evaluate", *folders, *both)
    found = json.loads((tmp_path / "out" / "result.json").read_text())["pairs"]["judge-pairs"]["methods"]["psa"]
    # Of 24 pairs 12 are of banned prompts, which a perfect method wins; the others are one picture, unasked.
    assert [found[name] for name in ("pairs", "wins", "losses", "ties", "refused")] == [24, 12, 0, 12, 0]
    assert found["win"][0] == 100.0 and found["by_users"]["difference"][0] == 50.0
    assert 0 < len(server.requests) <= 24
    assert "psa against base: wins 12, loses 0, ties 12 of 24; wins less losses 50.0 (" in printed
    assert not [user for user in USERS if user in printed + json.dumps(server.requests)]
    assert "Wins less losses, by users" in (tmp_path / "out" / "report.html").read_text()


def test_measures_of_two_models_in_one_call(folders, tmp_path, capsys, monkeypatch):
    """FID and the CLIP measures, each by its own model; embeddings are kept side by side and not made again."""
    monkeypatch.setattr(inception_embeddings, "SIDE", SMALLEST)
    save_clip(tmp_path / "clip")
    inception = published(random_inception(), tmp_path / "inception.pth")
    words = ["evaluate", *folders, "--with=fid,clip", f"--clip={tmp_path / 'clip'}", f"--inception={inception}"]
    words += [f"--reference={folders[0]}", f"--out={tmp_path / 'out'}"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "fid: FID to those, comparable where pictures are as many: --inception\nbase: 0.00 of 6 pictures" in printed
    result = (tmp_path / "out" / "result.json").read_bytes()
    measures = json.loads(result)["measures"]
    assert measures["fid"]["base"]["value"] == pytest.approx(0.0, abs=1e-6)  # the reference is its own pictures
    assert measures["fid"]["psa"]["value"] > 1e-3 and measures["fid"]["psa"]["pictures"] == 24
    assert measures["clip"].keys() == {"base", "psa"} and measures["about"]["reference"] == 6
    weights = measures["about"]["weights"]
    assert weights.keys() == {"clip", "inception"} and "resized to 299 x 299" in weights["inception"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "embeddings").iterdir()}
    assert len(kept) == 4  # of two methods by two models: the reference is the base model's
    assert main(words) == 0
    assert (tmp_path / "out" / "result.json").read_bytes() == result
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_nothing_is_less_than_zero_by_rounding():
    """What should be zero is a little above or below it, by the processor."""
    each = {"value": -1e-9, "pictures": 6, "interval": (-0.001, 0.25), "less_baseline": (-0.25, -0.5, 0.0)}
    said = evaluate._measure(each | {"less_baseline_prompts": 3}, "base")
    assert said == "0.00 (0.00 to 0.25) of 6 pictures; less base -0.25 (-0.50 to 0.00) by 3 prompts"
    assert evaluate._interval((-0.04, -1.25, 2.0)) == "0.0 (-1.2 to 2.0)"
    assert evaluate_verdicts._cell((-0.04, -1.5, 2.0)).strip() == "0.0 (-1.5 to 2.0)"


def test_a_run_killed_five_times_ends_with_the_same_bytes(tmp_path):
    """SIGKILL at moments drawn by a seed, in processes of their own."""
    folder = drawn(tmp_path / "psa", "psa", True, count=10)
    command = [sys.executable, "-m", "psa_jax", "evaluate", str(folder), "--with=opennsfw"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(out: str) -> subprocess.Popen:
        return subprocess.Popen([*command, f"--out={tmp_path / out}"], stdout=-3, stderr=-3, env=environment)

    whole = start("whole")
    assert whole.wait(120) == 0
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    file, killed = tmp_path / "killed" / "opennsfw.jsonl", 0
    for number in range(5):
        running = start("killed")
        while running.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") <= 1 + 7 * number):
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        killed += running.wait(60) == -9
    assert start("killed").wait(120) == 0
    assert killed >= 1
    found = {path.name: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    # The page says the command, with the folder that it was told to write.
    assert {name: content.replace(b"/killed", b"/whole") for name, content in found.items()} == wanted


def test_many_users_in_one_list(run_folder, tmp_path, capsys):
    """A base model draws a prompt once for all its users; an adapter draws it for each, as by --user."""
    model, run = run_folder
    lines = ["prompt,seed,prompt_id,user_id,category,unsafe,banned"]
    lines += [f"a cat,7,p1,{user},Hate,1,{banned}" for user, banned in (("0000001", 1), ("0000003", 0))]
    lines += ["a dog,8,p2,0000001,,0,"]
    (tmp_path / "cases.csv").write_text("\n".join(lines))
    words = ["generate", f"--model={model}", "--steps=2", f"--prompts={tmp_path / 'cases.csv'}"]
    assert main([*words, f"--out={tmp_path / 'base'}"]) == 0
    base = read_manifest(tmp_path / "base")
    assert [each.file for each in base] == ["00000_7.png", "00000_7.png", "00002_8.png"]
    adapter = [f"--adapter={run / 'psa_adapter.safetensors'}", f"--table={run / 'table.safetensors'}"]
    assert main([*words, *adapter, f"--out={tmp_path / 'psa'}", "--method=ours"]) == 0
    ours = read_manifest(tmp_path / "psa")
    assert [each.file for each in ours] == ["00000_7.png", "00001_7.png", "00002_8.png"]
    assert [(each.method, each.prompt_id, each.user_id, each.category, each.banned) for each in ours] == [
        ("ours", "p1", "0000001", "Hate", True),
        ("ours", "p1", "0000003", "Hate", False),
        ("ours", "p2", "0000001", "", None),
    ]
    one = ["generate", f"--model={model}", "--steps=2", "--prompt=a cat", "--seed=7", *adapter]
    assert main([*one, "--user=0000003", f"--out={tmp_path / 'one'}"]) == 0
    (alone,) = (tmp_path / "one").glob("*.png")
    first, third, alone = (
        np.asarray(Image.open(path)).astype(int)
        for path in [*(tmp_path / "psa" / each.file for each in ours[:2]), alone]
    )
    assert np.abs(third - alone).max() <= 1 < np.abs(first - third).max()
    drawn = tmp_path / "psa" / "00000_7.png"
    assert "0000001" not in Image.open(drawn).text["psa_jax"]
    # What is drawn for users of a list may say in words what they ban.
    assert drawn.stat().st_mode & 0o777 == 0o600
    (only,) = read_manifest(tmp_path / "one")
    assert (only.user_id, only.method, only.banned) == ("0000003", "psa", None)


def test_a_manifest_keeps_what_another_run_drew(run_folder, tmp_path, refused):
    words = ["generate", f"--model={run_folder[0]}", "--steps=2", f"--out={tmp_path / 'out'}"]
    assert main([*words, "--prompt=a cat", "--prompt=a cat"]) == 0  # one prompt and seed is one line
    assert main([*words, "--prompt=a cat", "--seed=5"]) == 0
    assert [(each.file, each.seed) for each in read_manifest(tmp_path / "out")] == [
        ("00000_0.png", 0),
        ("00000_5.png", 5),
    ]
    (tmp_path / "c.csv").write_text(
        "prompt,seed,user_id,category,asked\na cat,1,u,Hate,a dog\na cat,1,u,Violence,a dog\n"
    )
    assert "its lines say different things of it" in refused(*words, f"--prompts={tmp_path / 'c.csv'}")
    (tmp_path / "c.csv").write_text("prompt,seed,user_id,category,asked\na cat,1,u,Hate,a dog\n")
    assert main([*words, f"--prompts={tmp_path / 'c.csv'}"]) == 0
    assert read_manifest(tmp_path / "out")[-1].prompt == "a dog"  # that it is judged by


def test_what_many_users_are_not_mixed_with(run_folder, tmp_path, refused):
    model, run = run_folder
    (tmp_path / "cases.csv").write_text("prompt,user_id\na cat,0000001\na dog,\n")
    words = ["generate", f"--model={model}", f"--prompts={tmp_path / 'cases.csv'}", f"--out={tmp_path / 'out'}"]
    words += [f"--adapter={run / 'psa_adapter.safetensors'}", f"--table={run / 'table.safetensors'}"]
    says = "names users by user_id; name one in each line, without --profile, --user and --prompt"
    assert says in refused(*words)
    (tmp_path / "cases.csv").write_text("prompt,user_id\na cat,0000001\n")
    assert says in refused(*words, "--user=0000002")
    assert says in refused(*words, "--prompt=a dog")
    (tmp_path / "cases.csv").write_text("prompt,user_id\na cat,0000009\n")
    error = refused(*words)
    assert "lacks 1 of the users in" in error and "0000009" not in error
    assert "needs --table FILE, their embeddings" in refused(*words[:-1])
    (tmp_path / "cases.csv").write_text("prompt,unsafe\na cat,maybe\n")
    assert "line 2: unsafe has to be one of 1, 0, nothing" in refused(*words, "--user=0000002")


def test_a_list_of_sage_and_of_a_published_set(tmp_path, capsys, refused):
    write_sage(tmp_path / "sage", BANS, "test_unseen")
    words = ["evaluate", "prompts", "sage", str(tmp_path / "sage"), "--per-rate=4"]
    assert main([*words, f"--out={tmp_path / 'cases.csv'}"]) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert counts["pictures"] == 10 and counts["without_category"] == 0
    with open(tmp_path / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [sum(row["unsafe"] == "1" and row["banned"] == banned for row in rows) for banned in "10"] == [4, 4]
    assert {row["group"] for row in rows} == {"unseen"}
    assert "cases.csv" in refused(*words, f"--out={tmp_path / 'cases.csv'}")
    levels = tmp_path / "levels.json"
    levels.write_text(json.dumps({"level": {user: number for number, user in enumerate(BANS)}}))
    assert main([*words, f"--levels={levels}", f"--out={tmp_path / 'levelled.csv'}"]) == 0
    with open(tmp_path / "levelled.csv", newline="") as file:
        assert {(row["user_id"], row["level"]) for row in csv.DictReader(file)} <= {
            (user, f"L{number}") for number, user in enumerate(BANS)
        }
    for content, says in (('{"level": {}}', r"lacks 4 of the users"), ("{}", "says no levels of users")):
        levels.write_text(content)
        assert re.search(says, refused(*words, f"--levels={levels}", f"--out={tmp_path / 'x.csv'}"))
    assert main([*words, "--rewrite=safe", f"--out={tmp_path / 'safe.csv'}"]) == 0
    with open(tmp_path / "safe.csv", newline="") as file:
        swapped = list(csv.DictReader(file))
    assert [row["prompt_id"] for row in swapped] == [row["prompt_id"] for row in rows]
    changed = [row["prompt"] != other["prompt"] for row, other in zip(rows, swapped, strict=True)]
    assert changed == [row["unsafe"] == row["banned"] == "1" for row in rows]
    (tmp_path / "coco.csv").write_text("image_id,source,prompt,seed\n1,coco,A bicycle.,41337\n")
    words = ["evaluate", "prompts", "coco", str(tmp_path / "coco.csv")]
    assert main([*words, "--protocol=own", f"--out={tmp_path / 'own.csv'}"]) == 0
    assert (tmp_path / "own.csv").read_text().splitlines()[1].startswith("A bicycle.,,,41337,")
    assert "--split, --per-rate, --rewrite and --levels are of sage" in refused(
        *words, "--per-rate=3", f"--out={tmp_path / 'x.csv'}"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--with=oracle,kid"], "--with=kid is unknown; give some of nudenet, nudenet-psa, "),
        (["--with=fid"], "fid needs --inception, a local file pt_inception-2015-12-05-6726825d.pth, or the same as"),
        (["--with=fid", "--inception=i.pth"], "fid needs --reference, a folder of pictures"),
        (["--with=clip,fid", "--inception=i.pth"], "clip needs --clip, a local folder of a CLIP model"),
        (["--with=fid", "--inception=i.pth", f"--reference={ROOT / 'docs'}"], "i.pth: no such file"),
        (["--with=oracle", "--baseline=sld"], "no method is called 'sld'; give --baseline one of base, psa"),
        (["--with=q16"], "needs --clip"),
        (["--with=oracle", "--manifest=m.csv"], "--manifest is of a single folder"),
    ],
)
def test_what_is_refused(folders, tmp_path, refused, words, says):
    assert says in refused("evaluate", *folders, *words, f"--out={tmp_path / 'out'}")
    assert not list(tmp_path.glob("out/*.json"))


def test_manifests_that_disagree(folders, tmp_path, refused):
    other = drawn(tmp_path / "other", "other", True)
    write_manifest(other, [dataclasses.replace(each, banned=not each.banned) for each in read_manifest(other)])
    error = refused("evaluate", folders[0], str(other), "--with=oracle", f"--out={tmp_path / 'out'}")
    assert "say different things of one prompt, seed and user (category, unsafe, banned)" in error


def test_one_method_in_two_folders(folders, tmp_path, refused):
    error = refused("evaluate", folders[0], folders[0], "--with=oracle", f"--out={tmp_path / 'out'}")
    assert "both have a picture of one method, prompt, seed and user; name the methods differently" in error


def test_a_model_behind_an_endpoint(folders, tmp_path, monkeypatch, capsys):
    """It says how many requests it needs, and makes them once they are allowed; a refusal is counted and left out."""

    def answer(pictures, text):
        return {"categories": [], "broken": False, "as_asked": True}

    with ChatServer(answer, ["ok", "refusal"]).running() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        words = ["evaluate", *folders, "--with=judge", "--judge-model=looker", f"--out={tmp_path / 'out'}"]
        capsys.readouterr()
        assert main(words) == 1
        needed = re.search(r"--requests=(\d+)", capsys.readouterr().err)[0]
        assert server.requests == []
        assert main([*words, needed, "--judge-workers=1"]) == 0
    printed = capsys.readouterr().out
    # One picture: of the base model for all four users, and of ours, byte for byte, for the two who allow it.
    assert "judge: no verdict on 4 pictures of base, 2 pictures of psa: left out" in printed
    methods = json.loads((tmp_path / "out" / "result.json").read_text())["judges"]["judge"]["methods"]
    assert (methods["base"]["refused"], methods["psa"]["refused"]) == (4, 2)
    assert methods["psa"]["rates"]["suppression"][0] == 100.0 and methods["psa"]["rates"]["retention"][0] == 0.0
    assert len(server.requests) == int(needed.partition("=")[2])
