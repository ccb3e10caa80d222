"""The judge behind an endpoint, over real HTTP, against a server that misbehaves in every way it can."""

import contextlib
import json

import numpy as np
import pytest
from PIL import Image
from support.chat_server import ChatServer, asked

from psa_jax.categories import CATEGORIES
from psa_jax.errors import PSAError
from psa_jax.evaluation.judges.chat import check_answer
from psa_jax.evaluation.judges.judge import JudgeSettings, PaidJudge, make_judge
from psa_jax.evaluation.protocol import Case
from psa_jax.evaluation.readings import Readings

CASE = Case("0000001", "a cat", "Violence", True, True)
KEY = "secret-key"


def by_brightness(pictures: list[np.ndarray], text: str) -> dict:
    """Bright pictures are violent, black ones broken."""
    (picture,) = pictures
    return {
        "categories": ["Violence", "Hate"] if picture.mean() > 100 else [],
        "broken": bool(picture.mean() == 0.0),
        "as_asked": "cat" in text,
    }


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("psa_jax.evaluation.judges.chat.FIRST_PAUSE", 0.01)


@contextlib.contextmanager
def judge(monkeypatch, faults=(), seconds: float = 1.0, **settings):
    with ChatServer(by_brightness, list(faults), seconds).running() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield (
            make_judge(
                "judge", JudgeSettings(model="looker", **{"workers": 1, "timeout": 5.0, "requests": 99} | settings)
            ),
            server,
        )


def grey(level: int) -> np.ndarray:
    return np.full((9, 7, 3), level, np.uint8)


PICTURES = [grey(200), grey(50), grey(0)]


def test_what_is_asked_and_what_is_made_of_it(monkeypatch):
    """Pixels arrive as they are; nobody's id, ban or method does."""
    with judge(monkeypatch) as (ours, server):
        found = ours(PICTURES, [CASE] * 3)
        hate = ours(PICTURES[:1], [Case("", "a dog", "Propaganda", True, False)])
    assert isinstance(ours, PaidJudge) and found.missing is None
    assert found.has_content.tolist() == [True, False, False]
    assert found.clean.tolist() == [False, True, False] and found.faithful.tolist() == [True, True, False]
    assert (hate.has_content.tolist(), hate.faithful.tolist()) == ([False], [False])
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["model"] == "looker"
    assert request["authorization"] == f"Bearer {KEY}"
    (picture,), text = asked(request)
    np.testing.assert_array_equal(picture, PICTURES[0])
    assert text == 'The words: "a cat"'
    form = request["response_format"]["json_schema"]
    assert form["strict"] and form["schema"]["properties"]["categories"]["items"]["enum"] == list(CATEGORIES)
    whole = json.dumps({name: value for name, value in request.items() if name != "authorization"})
    assert not [word for word in ("0000001", "bans", "psa", "method", KEY) if word in whole]
    assert KEY not in json.dumps(dict(ours.about)) and ours.about["address"] == f"{server.url}/"


@pytest.mark.parametrize(
    "faults",
    [["429"], ["500", "503"], ["cut"], ["slow"], ["broken"], ["form"], ["429", "500", "cut", "broken", "cut", "form"]],
    ids="-".join,
)
def test_a_server_that_misbehaves_for_a_while(monkeypatch, faults):
    with judge(monkeypatch, faults, timeout=0.3) as (ours, server):
        found = ours(PICTURES, [CASE] * 3)
    assert found.has_content.tolist() == [True, False, False]
    assert len(server.requests) == 3 + len(faults)


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (["429"] * 6, r"127\.0\.0\.1 answered 429 .*no \(429\).*; what was judged is kept: run again"),
        (["401"], r"127\.0\.0\.1 answered 401"),
        (["404"], r"127\.0\.0\.1 answered 404"),
        (["cut"] * 6, r"could not be reached in 6 tries .*; what was judged is kept: run again"),
        (["broken"] * 3, "answered 3 times in another form than was asked for .*follows response_format"),
        (["form"] * 3, "another form than was asked for .categories is no list of the seven"),
        (["empty"], "does not answer as a chat; check OPENAI_BASE_URL, which usually ends in /v1"),
        (["nothing"], "does not answer as a chat"),
        (["html"], "does not answer as a chat"),
        (["halved"], "does not answer as a chat"),
    ],
    ids=["429", "401", "404", "cut", "broken", "form", "empty", "nothing", "html", "halved"],
)
def test_a_server_that_goes_on_misbehaving_is_an_error_and_no_verdict(monkeypatch, tmp_path, faults, says):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, picture in zip(paths, PICTURES, strict=True):
        Image.fromarray(picture).save(path)
    with judge(monkeypatch, ["ok", *faults]) as (ours, server):
        with pytest.raises(PSAError, match=says) as caught:
            Readings(tmp_path / "j.jsonl", ours).judged(paths, [CASE] * 3, "judge")
        assert "\n" not in str(caught.value) and KEY not in str(caught.value)
        asked_before = len(server.requests)
        found = Readings(tmp_path / "j.jsonl", ours).judged(paths, [CASE] * 3, "judge")
    # What was judged before is not asked for, and not paid for, again.
    assert found.has_content.tolist() == [True, False, False] and len(server.requests) == asked_before + 2


def test_a_refusal_is_no_verdict(monkeypatch, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, picture in zip(paths, PICTURES, strict=True):
        Image.fromarray(picture).save(path)
    with judge(monkeypatch, ["ok", "refusal"], requests=3) as (ours, server):
        for _ in range(2):
            found = Readings(tmp_path / "j.jsonl", ours).judged(paths, [CASE] * 3, "judge")
            assert found.missing.tolist() == [False, True, False] and found.has_content[0]
    assert len(server.requests) == 3


def test_nothing_is_asked_that_was_not_allowed(monkeypatch, tmp_path, capsys):
    path = tmp_path / "0.png"
    Image.fromarray(grey(9)).save(path)
    says = r"needs 1 requests to 127.0.0.1 and may make 0; .* --requests=1$"
    with judge(monkeypatch, requests=0) as (ours, server), pytest.raises(PSAError, match=says):
        Readings(tmp_path / "j.jsonl", ours).judged([path], [CASE], "judge")
    assert server.requests == []
    assert "judge: 1 requests to 127.0.0.1, each with a picture and its prompt, about " in capsys.readouterr().err


def test_answers_of_another_form_are_counted(monkeypatch, tmp_path):
    """They are paid for: no more are taken than were allowed. Requests that a busy server refuses are not."""
    path = tmp_path / "0.png"
    Image.fromarray(grey(9)).save(path)
    says, faults = r"has given as many answers as are allowed \(1\)", ["429", "form", "form"]
    with judge(monkeypatch, faults, requests=1) as (ours, server), pytest.raises(PSAError, match=says):
        Readings(tmp_path / "j.jsonl", ours).judged([path], [CASE], "judge")
    assert len(server.requests) == 2


def test_requests_a_minute(monkeypatch):
    with judge(monkeypatch, ["429", "cut"], per_minute=600.0, workers=4) as (ours, server):
        ours([grey(9)] * 6, [CASE] * 6)
    assert max(server.times) - min(server.times) >= 0.9 * 7 * 0.1  # those that are made again with them


def test_what_it_needs(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(PSAError, match="the judge needs --judge-model"):
        make_judge("judge", JudgeSettings())
    with pytest.raises(PSAError, match="the judge needs OPENAI_API_KEY in the environment, and OPENAI_BASE_URL"):
        make_judge("judge", JudgeSettings(model="looker"))


@pytest.mark.parametrize(
    "change",
    [{"categories": ["violence"]}, {"categories": None}, {"categories": [["Hate"]]}, {"broken": 1}, {"as_asked": "no"}],
)
def test_answers_of_another_form(change):
    right = {"categories": ["Hate"], "broken": False, "as_asked": True}
    assert check_answer(right) == (frozenset({"Hate"}), False, True)
    with pytest.raises(PSAError):
        check_answer(right | change)
    for name in right:
        with pytest.raises(PSAError):
            check_answer({other: value for other, value in right.items() if other != name})
