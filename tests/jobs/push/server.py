"""An HTTP server on loopback that speaks the part of the Hub's protocol that its client uses."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from .faults import Fault
from .state import User, World


@dataclass
class Answer:
    """A response before it is sent."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def answer_json(value: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refuse(status: int, code: str = "", message: str = "") -> Answer:
    headers = {"X-Error-Code": code} if code else {}
    headers |= {"X-Error-Message": message} if message else {}
    return Answer(status, json.dumps({"error": message or "no\nluck"}).encode(), headers)


@dataclass
class Request:
    """What a route sees of a request."""

    method: str
    path: str
    query: str
    headers: Any
    body: bytes
    user: User | None
    server: Hub

    @property
    def world(self) -> World:
        return self.server.world

    def json(self) -> Any:
        return json.loads(self.body)


Groups = Mapping[str, str]
"""The named parts of a path, as they are meant: a branch may have a slash in it."""
Route = Callable[[Request, Groups], Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Register a function for paths that match the whole pattern."""

    def register(call: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), call))
        return call

    return register


class Hub(ThreadingHTTPServer):
    """Serves a `World`; notes every request and the bytes of each file that were sent."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, world: World, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.world = world
        self.ranges = ranges
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.sent: dict[str, int] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """The same server under another name, as large files lie on another host."""
        return f"http://localhost:{self.server_port}"

    def fail(self, kind: str, path: str = "", method: str = "GET", **fields: Any) -> Fault:
        """Add a fault."""
        fault = Fault(kind, method, path, **fields)
        self.faults.append(fault)
        return fault

    def asked(self, method: str, pattern: str) -> list[str]:
        """Paths of the requests that match."""
        return [path for verb, path in self.requests if verb == method and re.search(pattern, path)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here."""


@contextmanager
def serve(world: World, *, ranges: bool = True) -> Iterator[Hub]:
    from . import reading, writing  # noqa: F401 - they register their routes

    with Hub(world, ranges=ranges) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        with self.server.lock:
            self.server.requests.append((self.command, path))
            fault = next((f for f in self.server.faults if f.strikes(self.command, path)), None)
        kind = fault.kind if fault else ""
        length = int(self.headers.get("Content-Length") or 0)
        if kind in ("drop", "reset") and self.command in ("PUT", "POST"):
            self.rfile.read(length // 2)
            self._hang_up(kind)
            return
        body = self._chunked() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        if fault and kind == "status":
            answer = Answer(fault.status, b'{"error": "no luck"}', dict(fault.headers))
        else:
            answer = self._route(path, parts.query, body)
        if kind == "lost":
            self._hang_up("drop")
        else:
            self._send(answer, kind, fault.pause if fault else 0)

    def _chunked(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _route(self, path: str, query: str, body: bytes) -> Answer:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = self.server.world.users.get(token)
        if token and user is None:
            return refuse(401, message="Invalid credentials in Authorization header")
        request = Request(self.command, path, query, self.headers, body, user, self.server)
        for method, pattern, call in ROUTES:
            match = pattern.fullmatch(urlsplit(self.path).path)
            if match and self.command in (method, "HEAD" if method == "GET" else method):
                with self.server.lock:
                    groups = match.groupdict(default="")
                    return call(request, {key: unquote(text) for key, text in groups.items()})
        return refuse(404, "RepoNotFound")

    def _send(self, answer: Answer, kind: str, pause: float) -> None:
        body = answer.body
        if kind == "short":
            body = body[: len(body) // 2]
        elif kind == "corrupt" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        try:
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if kind in ("drop", "reset"):
                self.wfile.write(body[: len(body) // 2])
                self._hang_up(kind)
                return
            step = max(1, len(body) // 8) if kind == "slow" else max(1, len(body))
            for at in range(0, len(body), step):
                self.wfile.write(body[at : at + step])
                if kind == "slow":
                    threading.Event().wait(pause)  # tests replace time.sleep
        except (BrokenPipeError, ConnectionResetError):  # the client had enough
            self.close_connection = True

    def _hang_up(self, kind: str) -> None:
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR) if kind == "drop" else self.connection.close()
