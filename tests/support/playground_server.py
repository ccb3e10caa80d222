"""A server of the playground on a free port, in a thread of the test."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from psa_jax.playground import server
from psa_jax.playground.page import render_page

CHILD = {"age": "9", "gender": "female"}
VETERAN = {"age": "61", "gender": "male", "religion": "Buddhism", "mental_condition": "natural disasters"}
ASKED = {"prompt": "a cat", "users": [CHILD, VETERAN], "seed": "7", "steps": 2, "guidance": 3, "scale": 1}
ABOUT = {"facts": {"Adapter": "a & b"}, "steps": 2, "guidance": 3.0, "size": 16, "examples": ("a dog", "a 'cat'")}


class Reply(NamedTuple):
    """An answer of the server; `found` is its JSON, or the text of the page."""

    status: int
    headers: dict[str, str]
    found: Any


class Served(NamedTuple):
    """A server that runs."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(self, method: str, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str) -> Reply:
        """Sends exactly these headers; `_` stands for `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method, path, body, given, encode_chunked=not isinstance(body, bytes | None))
            answer = connection.getresponse()
            text = answer.read().decode()
            names = {name.lower(): value for name, value in answer.getheaders()}
            is_json = names.get("content-type") == "application/json"
            return Reply(answer.status, names, json.loads(text) if is_json else text)

    def post(self, asked: Any, **headers: str) -> Reply:
        """Asks for a set as the page does; bytes go as they are."""
        body = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        return self.send("POST", "/draw", body, **{"Content_Type": "application/json", "Origin": self.url} | headers)


@contextlib.contextmanager
def serving(draw: Callable, allow_unprotected: bool = False) -> Iterator[Served]:
    """Runs a server that draws with `draw`."""
    about = {**ABOUT, "allow_unprotected": allow_unprotected, "own_bans": True}
    with server.bound(0) as listening:
        port = listening.getsockname()[1]
        app = server.make_app(draw, lambda nonce: render_page(nonce, **about), allow_unprotected, port)
        running = server.make_server(app)
        listening.listen()
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not running.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Served(port)
        finally:
            running.should_exit = True
            thread.join(30)
    assert not thread.is_alive()
