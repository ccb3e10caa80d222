"""Two pictures side by side, judged over real HTTP: both orders, blind names, ties, cost, and what is kept."""

import contextlib
import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image
from support.chat_server import ChatServer, asked

from psa_jax.errors import PSAError
from psa_jax.evaluation.judges.judge import JudgeSettings
from psa_jax.evaluation.judges.pairs import Pair, make_pair_judge
from psa_jax.evaluation.manifest import Pictured
from psa_jax.evaluation.pair_wins import compared_pairs, pairs_of, won

GREYS = {"dark": 20, "middle": 120, "bright": 220}


def brighter(pictures: list[np.ndarray], text: str) -> dict:
    first, second = (picture.mean() for picture in pictures)
    return {"better": "A" if first > second + 1 else "B" if second > first + 1 else "same"}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("psa_jax.evaluation.judges.chat.FIRST_PAUSE", 0.01)


@pytest.fixture
def paths(tmp_path):
    found = {}
    for name, grey in GREYS.items():
        found[name] = tmp_path / f"{name}.png"
        Image.fromarray(np.full((9, 7, 3), grey, np.uint8)).save(found[name])
    return found


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """A function: how the server answers, its faults and settings -> a judge and its server, in a context."""

    @contextlib.contextmanager
    def make(answer=brighter, faults=(), file="pairs.jsonl", **settings):
        with ChatServer(answer, faults if isinstance(faults, list) else list(faults)).running() as server:
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
            values = {"workers": 1, "timeout": 5.0, "requests": 99} | settings
            yield make_pair_judge(tmp_path / file, JudgeSettings(model="looker", **values)), server

    return make


def pair(paths, ours: str, theirs: str, bans=("Hate", "Violence")) -> Pair:
    return Pair(paths[ours], paths[theirs], "a cat", bans)


def test_a_picture_wins_in_both_orders_or_not_at_all(judged, paths):
    pairs = [pair(paths, "bright", "dark"), pair(paths, "dark", "middle"), pair(paths, "dark", "dark", ())]
    with judged() as (judge, server):
        assert judge.preferences(pairs) == [1, -1, 0]
    assert len(server.requests) == 4  # two for each pair, none for a picture beside itself
    shown = [tuple(round(float(picture.mean())) for picture in asked(body)[0]) for body in server.requests]
    assert sorted(shown) == [(20, 120), (20, 220), (120, 20), (220, 20)]


def test_a_model_that_prefers_a_place_makes_ties(judged, paths):
    for place in "AB":
        with judged(lambda pictures, text, place=place: {"better": place}, file=place) as (judge, _):
            assert judge.preferences([pair(paths, "bright", "dark")]) == [0]


def test_what_is_sent(judged, paths):
    with judged() as (judge, server):
        judge.preferences([pair(paths, "bright", "dark"), pair(paths, "bright", "middle", ())])
    texts = [asked(body)[1] for body in server.requests]
    assert all('The words: "a cat"' in text and "A is the first picture" in text for text in texts)
    assert sum("does not want to see: Hate, Violence." in text for text in texts) == 2
    assert sum("does not want to see: nothing in particular." in text for text in texts) == 2
    said = " ".join([*texts, *(body["messages"][0]["content"] for body in server.requests)]).lower()
    assert not {"psa", "base", "ours", "theirs", "bright", "user", "method", "secret"} & set(re.findall(r"\w+", said))
    assert "secret-key" not in json.dumps([{**body, "authorization": ""} for body in server.requests])


def test_what_was_said_is_kept(judged, paths, tmp_path):
    pairs = [pair(paths, "bright", "dark"), pair(paths, "dark", "middle")]
    faults = []
    with judged(faults=faults) as (judge, server):
        assert judge.preferences(pairs[:1]) == [1]
        file = tmp_path / "pairs.jsonl"
        file.write_bytes(file.read_bytes()[:-9])  # killed while it wrote
        faults += ["429", "cut", "broken"]
        again = make_pair_judge(file, JudgeSettings(model="looker", requests=99, workers=1))
        assert again.preferences(pairs) == [1, -1]
        assert len(server.requests) == 2 + 3 + 3  # one line was lost, two are new, three were spoilt
        assert again.preferences(pairs) == [1, -1] and len(server.requests) == 8


def test_a_refusal_is_no_tie(judged, paths):
    with judged(faults=["refusal"]) as (judge, _):
        assert judge.preferences([pair(paths, "bright", "dark"), pair(paths, "dark", "middle")]) == [None, -1]


def test_the_cost_is_said_before(judged, paths, capsys):
    with judged(requests=3) as (judge, server):
        with pytest.raises(PSAError, match=r"needs 4 requests to 127\.0\.0\.1 and may make 3; .*--requests=4"):
            judge.preferences([pair(paths, "bright", "dark"), pair(paths, "dark", "middle")])
        assert server.requests == []
    assert "4 requests to 127.0.0.1, with two pictures" in capsys.readouterr().err


def test_another_model_does_not_take_over_what_was_kept(judged, paths, tmp_path):
    with judged() as (judge, _):
        judge.preferences([pair(paths, "bright", "dark")])
        with pytest.raises(PSAError, match=r"pairs\.jsonl: holds verdicts of another judge \(model\)"):
            make_pair_judge(tmp_path / "pairs.jsonl", JudgeSettings(model="other"))
    with pytest.raises(PSAError, match="needs --judge-model"):
        make_pair_judge(tmp_path / "pairs.jsonl", JudgeSettings())


def line(user: str, prompt: str, method: str = "psa", banned: bool = False) -> Pictured:
    return Pictured("x.png", method, prompt, 7, "a cat", user, "Violence", True, banned)


def test_wins_by_hand():
    """Five pairs of three users: two wins, a loss, a tie, and one of which nothing was said."""
    lines = [line(user, f"p{number}") for number, user in enumerate("aabbc")]
    found = won([1, 1, -1, 0, None], lines)
    assert [found[name] for name in ("pairs", "refused", "wins", "losses", "ties")] == [5, 1, 2, 1, 1]
    assert found["win"][0] == pytest.approx(200 / 3) and found["win"][1] < 200 / 3 < found["win"][2]
    assert found["by_users"]["difference"][0] == pytest.approx(25.0) and found["by_users"]["users"] == 2
    assert found["by_prompts"]["prompts"] == 4
    nothing = won([None], lines[:1])
    assert nothing["refused"] == 1 and "win" not in nothing and "by_users" not in nothing
    tied = won([0, 0], lines[:2])
    assert "win" not in tied and tied["by_prompts"]["difference"][0] == 0.0


def test_pairs_are_of_one_prompt_seed_and_user(paths):
    listed = [
        (paths["dark"], line("a", "p0", "base", banned=True)),
        (paths["dark"], line("b", "p0", "base")),
        (paths["bright"], line("a", "p0")),
        (paths["bright"], line("b", "p1")),
    ]
    ((found, its),) = pairs_of(listed, "psa", "base")
    assert found == Pair(paths["bright"], paths["dark"], "a cat", ("Violence",)) and its.user_id == "a"
    everything = compared_pairs(listed, "base", lambda pairs: [1] * len(pairs))
    assert everything.keys() == {"psa"} and everything["psa"]["wins"] == 1
    asks = dataclasses.replace(line("a", "p0"), prompt="a dog")
    with pytest.raises(PSAError, match="prompt_id p0 is of one prompt in psa and another in base"):
        pairs_of([*listed[:1], (paths["bright"], asks)], "psa", "base")
    unknown = dataclasses.replace(line("a", "p0"), banned=None)
    with pytest.raises(PSAError, match="does not say whether the user bans its category"):
        pairs_of([*listed[:1], (paths["bright"], unknown)], "psa", "base")
    with pytest.raises(PSAError, match="draw both from one list"):
        compared_pairs(listed[:2] + listed[3:], "base", lambda pairs: [])
