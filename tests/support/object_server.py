"""A server on this machine that keeps objects and speaks S3's protocol over real HTTP; Google's XML is the same."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape


class ObjectServer:
    """One bucket, `bucket`.

    Attributes:
      objects: key -> content.
      refuses: methods that are answered with 403.
      puts_left: objects that it takes before it refuses PUT; None for all.
      requests: method and path of each, in the order in which they came.
      authorization: that header of each.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.refuses: set[str] = set()
        self.puts_left: int | None = None
        self.requests: list[tuple[str, str]] = []
        self.authorization: list[str] = []
        self._parts: dict[tuple[str, int], bytes] = {}
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What clients on this machine have to be told, for s3:// and gs://."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "an-id",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
            "AWS_REGION": "us-east-1",
            "STORAGE_EMULATOR_HOST": self.url,
        }

    @contextlib.contextmanager
    def running(self) -> Iterator["ObjectServer"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def answer(self, method: str, key: str, query: dict[str, list[str]], body: bytes, match: str | None):
        """Status, content and headers."""
        if method in self.refuses:
            return 403, b"<Error><Code>AccessDenied</Code></Error>", {}
        if method == "PUT" and "partNumber" not in query:
            if self.puts_left == 0:
                return 403, b"<Error><Code>AccessDenied</Code></Error>", {}
            self.puts_left = None if self.puts_left is None else self.puts_left - 1
        if method == "GET" and not key:
            return 200, self._list(query.get("prefix", [""])[0]), {}
        if method == "POST":
            return self._post(key, query, body)
        if method == "PUT" and "partNumber" in query:
            self._parts[query["uploadId"][0], int(query["partNumber"][0])] = body
            return 200, b"", {"ETag": _etag(body)}
        if method == "PUT":
            self.objects[key] = body
            return 200, b"", {"ETag": _etag(body)}
        if method == "DELETE":
            self.objects.pop(key, None)
            return 204, b"", {}
        if key not in self.objects:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        content = self.objects[key]
        if match not in (None, _etag(content)):
            return 412, b"", {}
        return 200, content, {"ETag": _etag(content), "Last-Modified": "Mon, 02 Jan 2006 15:04:05 GMT"}

    def _post(self, key: str, query: dict[str, list[str]], body: bytes):
        if "delete" in query:
            keys = [found.text for found in ElementTree.fromstring(body).iter() if found.tag.endswith("Key")]
            for each in keys:
                self.objects.pop(each, None)
            said = "".join(f"<Deleted><Key>{escape(each)}</Key></Deleted>" for each in keys)
            return 200, f"<DeleteResult>{said}</DeleteResult>".encode(), {}
        if "uploads" in query:
            name = hashlib.md5(f"{key} {len(self.requests)}".encode()).hexdigest()
            said = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            return 200, said.encode(), {}
        upload = query["uploadId"][0]
        parts = sorted(number for each, number in self._parts if each == upload)
        self.objects[key] = b"".join(self._parts.pop((upload, number)) for number in parts)
        etag = escape(_etag(self.objects[key]))
        said = f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
        return 200, said.encode(), {}

    def _list(self, prefix: str) -> bytes:
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2006-01-02T15:04:05.000Z</LastModified>"
            f"<ETag>{escape(_etag(content))}</ETag><Size>{len(content)}</Size></Contents>"
            for key, content in sorted(self.objects.items())
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self):
                parts = urlsplit(self.path)
                bucket, _, key = unquote(parts.path).strip("/").partition("/")
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                if len(body) < size:  # who puts it has been killed: there is no such object
                    self.close_connection = True
                    return
                with server._lock:
                    server.requests.append((self.command, unquote(self.path)))
                    server.authorization.append(self.headers.get("Authorization", ""))
                    query = parse_qs(parts.query, keep_blank_values=True)
                    status, content, headers = 404, b"<Error><Code>NoSuchBucket</Code></Error>", {}
                    if bucket == "bucket":
                        match = self.headers.get("If-Match")
                        status, content, headers = server.answer(self.command, key, query, body, match)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD" and status != 204:
                    with contextlib.suppress(OSError):  # who asked has gone
                        self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        return Handler


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients that are killed close their connections."""


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def until(met, seconds: float = 60.0) -> None:
    """Waits until `met()`."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.01)
