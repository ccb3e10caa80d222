"""The server of the page: HTTP on the loopback interface, for this machine's own browser.

Any page that a browser shows may send requests to loopback addresses, and a name of its own may point there. So a
request counts only if it names this server as its host, and a set of pictures is drawn only for this page itself.
What comes in and goes out is about persons: nothing of it is logged, kept or cached.
"""

import errno
import logging
import secrets
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from psa_jax.errors import PSAError
from psa_jax.playground.asked import MOST_BYTES, Asked, Refused, read_asked
from psa_jax.progress import print_on_main

LOOPBACK = "127.0.0.1"
MOST_WAITING = 8
"""Requests that may wait for the one that is drawn."""
_BODY_SECONDS = 10.0
_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Draw = Callable[[Asked], dict[str, Any]]
Render = Callable[[str], str]


def bound(port: int) -> socket.socket:
    """A socket at a port of the loopback interface, which does not listen yet.

    Args:
      port: 0 for any free one.

    Raises:
      PSAError: the port is taken, or only for the administrator.
    """
    # There is no other address to choose: the page would show to others what is about persons.
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((LOOPBACK, port))
    except OSError as error:
        taken.close()
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise PSAError(f"port {port} {why}; give another one by --port, or --port=0 for any free one") from error
    return taken


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server for `run(sockets=[…])` with the socket of `bound`.

    It ends with the process's signals, as KeyboardInterrupt for Ctrl-C; a set that is being drawn is finished first.

    Args:
      app: of `make_app`.
    """
    # access_log=False takes its handlers away; whatever gets one of its own later would still log addresses.
    logging.getLogger("uvicorn.access").disabled = True
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)


def make_app(draw: Draw, render: Render, allow_unprotected: bool, port: int) -> ASGIApp:
    """The application: the page at /, and a set of pictures for a POST to /draw.

    Args:
      draw: draws a set; it runs in a thread, one at a time.
      render: the page's HTML, with a nonce for its script and style.
      allow_unprotected: whether the base model's picture may be asked for.
      port: of the server.
    """
    turn = anyio.CapacityLimiter(1)
    waiting = 0

    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        return HTMLResponse(render(nonce), headers={"content-security-policy": _POLICY.format(nonce=nonce)})

    async def pictures(request: Request) -> Response:
        nonlocal waiting
        _check_sender(request)
        asked = read_asked(await _body(request), allow_unprotected)
        if waiting > MOST_WAITING:
            raise Refused("too many requests wait; try again later", status=429)
        waiting += 1
        try:
            async with turn:
                if await request.is_disconnected():  # its page has been closed: nobody would see the pictures
                    return Response(status_code=204)
                return JSONResponse(await anyio.to_thread.run_sync(draw, asked))
        except PSAError as error:
            raise Refused(" ".join(str(error).split())) from None
        finally:
            waiting -= 1

    routes = [Route("/", page), Route("/draw", pictures, methods=["POST"])]
    handlers = {Refused: _refused, HTTPException: _not_here, Exception: _failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), port)


class _Guard:
    """Turns away requests to other hosts, adds the headers, and keeps what is personal out of errors."""

    def __init__(self, app: ASGIApp, port: int):
        self._app = app
        self._hosts = {f"{name}:{port}" for name in (LOOPBACK, "localhost", "[::1]")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        app = self._app
        if Request(scope).headers.get("host", "").lower() not in self._hosts:
            # A name that points here (DNS rebinding) would make another site's script one of this page.
            app = _error("this server answers only to its own address on this machine", 403)
        try:
            await app(scope, receive, with_headers)
        except ClientDisconnect:
            return
        except Exception as error:  # after the answer of `_failed`; the server would log its text
            _report(error)


def _report(error: Exception) -> None:
    """Says on stderr where an error arose. Without its text, which may hold what a user typed."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in reversed(frames))
    print_on_main(f"error while drawing: {type(error).__name__} at {places}")


def _check_sender(request: Request) -> None:
    """Refuses what does not come from this page (cross-site request forgery): a browser always says its origin."""
    if request.headers.get("origin") != f"http://{request.headers['host'].lower()}":
        raise Refused("only the page of this server may ask for pictures", status=403)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("send JSON, as application/json", status=415)


async def _body(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = Refused(f"the request is larger than {MOST_BYTES:,} bytes", status=413)
    if declared.isdigit() and int(declared) > MOST_BYTES:
        raise too_large
    body = b""
    try:
        with anyio.fail_after(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise Refused("the request did not arrive in time", status=408) from None
    return body


def _error(message: str, status: int, where: str = "") -> Response:
    return JSONResponse({"error": message, "where": where}, status_code=status)


def _refused(request: Request, error: Any) -> Response:
    return _error(str(error), error.status, error.where)


def _failed(request: Request, error: Any) -> Response:
    return _error("an error inside the program; the terminal says where", 500)


def _not_here(request: Request, error: Any) -> Response:
    return JSONResponse({"error": error.detail, "where": ""}, status_code=error.status_code, headers=error.headers)
