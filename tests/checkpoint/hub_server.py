"""A small HTTP server on loopback that answers like the Hugging Face Hub for one made-up model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"

ERRORS = {
    "org/missing": (404, {"X-Error-Code": "RepoNotFound"}),
    "org/private": (401, {}),
    "org/gated": (403, {"X-Error-Code": "GatedRepo"}),
    "org/gated401": (401, {"X-Error-Code": "GatedRepo"}),
    "org/disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "org/badtoken": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "org/forbidden": (403, {}),
    "org/limited": (429, {}),
    "org/down": (500, {}),
}


class FakeHub(ThreadingHTTPServer):
    """Serves the files of `folder` as the model `org/model`, revision `main` or its commit."""

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = ranges
        self.requests: list[tuple[str, str]] = []
        self.sent: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(folder: Path, ranges: bool = True) -> Iterator[FakeHub]:
    with FakeHub(folder, ranges) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        for repo, (status, headers) in ERRORS.items():
            if path.startswith((f"/api/models/{repo}/", f"/{repo}/")) or path.endswith(f"/{repo}"):
                return self._send(status, b'{"error": "no\\nluck"}', headers, body)
        api, files = "/api/models/org/model", "/org/model/resolve/"
        if path in (api, f"{api}/revision/main"):
            return self._json({"id": "org/model", "sha": COMMIT, "siblings": []}, body)
        if path == f"{api}/tree/{COMMIT}":
            return self._json(self._tree(), body)
        if path.startswith(files):
            revision, _, name = path.removeprefix(files).partition("/")
            if revision in ("main", COMMIT) and (self.server.folder / name).is_file():
                return self._file(name, body)
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)

    def _tree(self) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": path.relative_to(self.server.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(self.server.folder.rglob("*"))
            if path.is_file()
        ]

    def _file(self, name: str, body: bool) -> None:
        data = (self.server.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        status, wanted = 200, self.headers.get("Range")
        if wanted and self.server.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            total = len(data)
            data = data[int(first) : int(last or total) + 1]
            status = 206
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{total}"
        self._send(status, data, headers, body)
        if body:
            self.server.sent[name] = self.server.sent.get(name, 0) + len(data)

    def _json(self, value: object, body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        try:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # the client had enough
            self.close_connection = True
