"""A server on this machine that speaks OpenAI's protocol for chats, well or badly, over real HTTP."""

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

OK = "ok"


class ChatServer:
    """Answers by `answer`, but for the first requests, which go as `faults` says, in the order in which they come.

    Args:
      answer: of the pictures of a request and its text; a str is a refusal.
      faults: of OK, a status such as "429", "cut", "slow", "broken", "form", "empty", "nothing", "html", "halved" and
        "refusal".
      seconds: that a slow answer takes.
    """

    def __init__(self, answer: Callable[[list[np.ndarray], str], dict], faults: list[str], seconds: float = 1.0):
        self.requests: list[dict] = []
        self.times: list[float] = []
        lock, chat = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    chat.requests.append(body | {"path": self.path, "authorization": self.headers["Authorization"]})
                    chat.times.append(time.monotonic())
                    fault = faults.pop(0) if faults else OK
                if fault == "cut":
                    self.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(seconds)
                if fault.isdecimal():
                    self.send(int(fault), {"error": {"message": f"no ({fault})"}}, {"Retry-After": "0.01"})
                    return
                said = {"content": json.dumps(answer(*asked(body))), "refusal": None}
                said |= {
                    "broken": {"content": '{"categories": ["Violence"'},
                    "form": {"content": '{"categories": "Violence", "broken": 0}'},
                    "refusal": {"content": None, "refusal": "I cannot look at this."},
                }.get(fault, {})
                if fault in ("html", "halved"):
                    self.plain(b"<html>Not here</html>" if fault == "html" else b'{"id": "1", "choi', fault == "html")
                    return
                choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **said}}]
                if fault == "nothing":
                    choices[0]["message"] = None
                found = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
                self.send(200, found | {"choices": [] if fault == "empty" else choices}, {})

            def plain(self, content: bytes, html: bool):
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if html else "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def send(self, status: int, found: dict, headers: dict[str, str]):
                content = json.dumps(found).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):  # who asked has gone
                    self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["ChatServer"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def asked(body: dict) -> tuple[list[np.ndarray], str]:
    """The pictures of a request, and its text."""
    parts = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    contents = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
    pictures = [np.asarray(Image.open(io.BytesIO(content))) for content in contents]
    return pictures, " ".join(part["text"] for part in parts if part["type"] == "text")
