"""The page's server over real HTTP: what it draws, what it refuses, and what it keeps to itself."""

import base64
import io
import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from support.playground_server import ASKED, CHILD, VETERAN, serving

from psa_jax.categories import CATEGORIES
from psa_jax.errors import PSAError
from psa_jax.evaluation.gate_words import sentence
from psa_jax.playground import server
from psa_jax.playground.asked import MOST_BYTES

PERSONAL = ("Buddhism", "natural disasters", "hearing impairment", "a cat")


def pixels(source: str) -> np.ndarray:
    """Pixels of a data URL."""
    start, _, content = source.partition(",")
    assert start == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content)), formats=["PNG"]) as picture:
        assert picture.info == {}
        return np.asarray(picture)


# --- what is drawn


@pytest.mark.parametrize("scale", [1.0, 0.35])
def test_pictures_are_those_of_the_python_face(served, pipe, scale):
    reply = served.post(ASKED | {"scale": scale})
    assert reply.status == 200
    settings = {"seed": 7, "scale": scale, "steps": 2, "guidance": 3.0, "batch_size": 4}
    for user, profile in zip(reply.found["users"], (CHILD, VETERAN), strict=True):
        alone = pipe.generate("a cat", profile=profile, **settings)
        np.testing.assert_array_equal(pixels(user["picture"]), np.asarray(alone))
    child, veteran = (pixels(user["picture"]) for user in reply.found["users"])
    assert (child != veteran).any()
    assert reply.found["base"] is None and reply.found["notes"] == [] and reply.found["seconds"] > 0


def test_what_is_replaced_is_said_by_category(served, pipe):
    for user, profile in zip(served.post(ASKED).found["users"], (CHILD, VETERAN), strict=True):
        gates = pipe.explain("a cat", profile=profile)
        assert list(gates) == list(CATEGORIES) and min(gates.values()) > 0 and max(gates.values()) < 1
        assert user["gates"] == {name: pytest.approx(value, abs=1e-4) for name, value in gates.items()}
        assert user["said"] == sentence(list(gates.values()), "this user bans")


def test_the_base_model_beside_is_the_base_model(served_open, pipe):
    reply = served_open.post(ASKED | {"base": True, "users": [VETERAN]})
    settings = {"seed": 7, "steps": 2, "guidance": 3.0, "batch_size": 4}
    base = pipe.generate("a cat", allow_unprotected=True, **settings)
    np.testing.assert_array_equal(pixels(reply.found["base"]), np.asarray(base))
    assert len(reply.found["users"]) == 1 and reply.found["users"][0]["picture"] != reply.found["base"]
    zero = served_open.post(ASKED | {"scale": 0, "users": [VETERAN]})
    np.testing.assert_array_equal(pixels(zero.found["users"][0]["picture"]), np.asarray(base))
    assert served_open.post(ASKED).found["base"] is None  # only where it is asked for


def test_a_prompt_that_is_too_long_is_said_on_the_page_only(served, caplog, capfd):
    with caplog.at_level(logging.WARNING, "psa_jax.playground"):
        reply = served.post(ASKED | {"prompt": "cat " * 99})
    assert reply.status == 200 and "does not read the end of this prompt: “cat" in reply.found["notes"][0]


def test_bans_of_ones_own_are_acted_on_or_refused(served_bits):
    user = {"age": 34, "gender": "male"}
    for own in ([], ["Violence"]):
        gates = served_bits.post(ASKED | {"users": [user | {"bans": own}]}).found["users"][0]["gates"]
        assert [name for name, value in gates.items() if value > 0] == own
    reply = served_bits.post(ASKED | {"users": [user | {"bans": ["Hate"]}]})
    assert reply.status == 400 and "not sure to act on the bans that the profile states" in reply.found["error"]
    assert "Hate" not in reply.found["error"]


# --- what is refused


def refusal(reply, status: int = 400) -> tuple[str, str]:
    """The line and the control of a refusal; nothing was drawn."""
    assert reply.status == status and set(reply.found) == {"error", "where"}
    assert "\n" not in reply.found["error"] and reply.found["error"]
    assert reply.headers["cache-control"] == "no-store"
    return reply.found["error"], reply.found["where"]


@pytest.mark.parametrize(
    ("changed", "where", "said"),
    [
        ({"users": []}, "users", "nobody is there to draw for; add a user"),
        ({"scale": 2}, "scale", "give a finite number of 0.05 or more and at most 1"),
        ({"scale": 0}, "scale", "0 is the base model, which needs psa-jax playground --allow-unprotected"),
        ({"seed": -1}, "seed", "seed: give a whole number from 0"),
        ({"steps": 201}, "steps", "steps: give a whole number from 1 to 200"),
        ({"guidance": "3"}, "guidance", "guidance: give a finite number"),
        ({"prompt": " "}, "prompt", "type a prompt"),
        ({"prompt": "x" * 2001}, "prompt", "the prompt has 2,001 characters; give at most 2,000"),
        ({"users": [CHILD, CHILD | {"age": "x"}]}, "users.1.age", 'user 2: "age" has a value that is not allowed'),
        ({"users": [{"age": 9}]}, "users.0.gender", 'user 1: "gender" is missing'),
        ({"negative": "x"}, "", "request: key 7 of 7 is unknown"),
    ],
)
def test_a_wrong_control_is_one_line_at_the_control(served, changed, where, said):
    line, control = refusal(served.post(ASKED | changed))
    assert said in line and control == where


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "request: not valid JSON"),
        (b"[]", "request: expected a JSON object, found a list"),
        (json.dumps(ASKED).replace('"scale": 1', '"scale": NaN').encode(), "it holds NaN, which is no JSON value"),
        (json.dumps(ASKED).replace('"scale": 1', '"scale": 1e999').encode(), "beyond a float"),
        (b'{"prompt": "a cat"}', '"users" is missing'),
        (b"\xff", "byte 0 is not UTF-8"),
        (b'{"seed": 1, "seed": 2}', "a key is given twice"),
    ],
)
def test_what_is_no_request_is_one_line(served, body, said):
    assert said in refusal(served.post(body))[0]


def test_the_base_model_is_not_drawn_without_the_flag(served):
    line, where = refusal(served.post(ASKED | {"base": True}), 403)
    assert "needs psa-jax playground --allow-unprotected" in line and where == "base"
    page = served.send("GET", "/").found
    assert 'id="base' not in page and "nprotected" not in re.sub(r"<(style|script).*?</\1>", "", page, flags=re.S)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", ""])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_another_host_is_turned_away(served, host, method):
    given = host.format(port=served.port)
    reply = served.post(ASKED, Host=given) if method == "POST" else served.send("GET", "/", Host=given)
    assert "answers only to its own address" in refusal(reply, 403)[0]


def test_its_own_names_are_taken(served):
    for host in (f"localhost:{served.port}", f"LOCALHOST:{served.port}", f"[::1]:{served.port}"):
        assert served.send("GET", "/", Host=host).status == 200
        own = {"Host": host, "Origin": f"http://{host.lower()}"}
        assert refusal(served.post(ASKED | {"steps": 0}, **own))[1] == "steps"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://localhost:{port}", "https://127.0.0.1:{port}"]
)
def test_another_origin_is_turned_away(served, origin):
    line, _ = refusal(served.post(ASKED, Origin=origin.format(port=served.port)), 403)
    assert line == "only the page of this server may ask for pictures"


def test_no_origin_and_a_form_are_turned_away(served):
    body = json.dumps(ASKED).encode()
    refusal(served.send("POST", "/draw", body, Content_Type="application/json"), 403)
    refusal(served.post(body, Content_Type="text/plain"), 415)  # what a form of another page can send


def test_a_large_body_is_turned_away(served):
    large = json.dumps(ASKED | {"prompt": "x" * MOST_BYTES}).encode()
    assert "larger than 32,768 bytes" in refusal(served.post(large), 413)[0]
    parts = iter([large[:20_000], large[20_000:]])  # chunked: no length is declared
    headers = {"Content_Type": "application/json", "Origin": served.url}
    refusal(served.send("POST", "/draw", parts, **headers), 413)


def test_there_is_nothing_else(served):
    assert refusal(served.send("GET", "/favicon.ico"), 404)[0] == "Not Found"
    refusal(served.send("GET", "/draw"), 405)
    refusal(served.send("GET", "/draw?prompt=a"), 405)
    refusal(served.send("POST", "/"), 405)


# --- what it keeps to itself


def test_the_page_loads_nothing_and_stores_nothing(served):
    first, second = served.send("GET", "/"), served.send("GET", "/")
    assert first.status == 200 and first.headers["content-type"] == "text/html; charset=utf-8"
    policy, other = (reply.headers["content-security-policy"] for reply in (first, second))
    nonce = re.search("'nonce-([^']{20,})'", policy)[1]
    assert nonce not in other
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert first.headers["cache-control"] == "no-store" and first.headers["x-content-type-options"] == "nosniff"
    assert not {"set-cookie", "server", "access-control-allow-origin"} & set(first.headers)
    assert set(re.findall(r'nonce="([^"]*)"', first.found)) == {nonce}
    outside = r"https?:|//\w|<link(?! rel=\"icon\" href=\"data:,\")|\bsrc=|@import|url\("
    kept = r"localStorage|sessionStorage|indexedDB|cookie"
    in_an_address = r"<(?:input|select|textarea|button)[^>]*\bname="
    for unwanted in (outside, kept, in_an_address, r"\bon\w+=\"", r"\bstyle="):
        assert not re.search(unwanted, first.found), unwanted
    assert "a &amp; b" in first.found and "a &#39;cat&#39;" in first.found


def test_logs_hold_nothing_that_was_typed(served, served_open, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for where in (served, served_open):
        assert where.post(ASKED).status == 200
        odd = VETERAN | {"physical_condition": "hearing impairment"}
        where.post(ASKED | {"users": [odd | {"age": "natural disasters"}]})
        where.post(ASKED | {"users": [odd], "seed": "Buddhism"})
        where.post(b'{"users": "Buddhism"')
        where.send("GET", "/draw?religion=Buddhism")
    shown = caplog.text + "".join(capfd.readouterr())
    assert [word for word in PERSONAL if word in shown] == []


def test_a_bug_is_said_without_what_was_typed(caplog, capfd):
    def broken(asked):
        raise KeyError(asked.users[0].religion, asked.prompt)

    caplog.set_level(logging.DEBUG)
    with serving(broken) as there:
        line, _ = refusal(there.post(ASKED | {"users": [VETERAN]}), 500)
        assert line == "an error inside the program; the terminal says where"
        assert there.post(ASKED | {"users": [VETERAN]}).status == 500  # and it goes on
    shown = caplog.text + "".join(capfd.readouterr())
    assert "psa-jax: error while drawing: KeyError at test_server.py:" in shown and "in broken" in shown
    assert [word for word in PERSONAL if word in shown] == []


def test_an_error_of_the_sampler_is_one_line():
    def picky(asked):
        raise PSAError("steps: the sampler\n  takes fewer")

    with serving(picky) as there:
        assert refusal(there.post(ASKED)) == ("steps: the sampler takes fewer", "")


def test_one_set_is_drawn_at_a_time():
    now, most = [], []

    def slow(asked):
        now.append(asked.seed)
        most.append(len(now))
        time.sleep(0.05)
        now.remove(asked.seed)
        return {"seed": asked.seed}

    with serving(slow) as there, ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda seed: there.post(ASKED | {"seed": seed}), range(4)))
    assert [reply.found["seed"] for reply in replies] == [0, 1, 2, 3] and most == [1] * 4


def test_too_many_that_wait_are_sent_away():
    go = threading.Event()
    with serving(lambda asked: {"drawn": go.wait(30)}) as there, ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(there.post, ASKED) for _ in range(server.MOST_WAITING + 3)]
        # The first one that is sent away is no sign that the last one has asked.
        while sum(each.done() for each in waiting) < 2:
            time.sleep(0.01)
        go.set()
        statuses = sorted(each.result().status for each in waiting)
    assert statuses == [200] * (server.MOST_WAITING + 1) + [429] * 2


# --- where it is


def test_it_is_bound_to_the_loopback_interface_alone():
    with server.bound(0) as first:
        host, port = first.getsockname()
        assert host == "127.0.0.1" and port > 0
        with pytest.raises(PSAError, match=rf"^port {port} is in use; give another one by --port, or --port=0 "):
            first.listen()
            server.bound(port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))  # it has been given back
