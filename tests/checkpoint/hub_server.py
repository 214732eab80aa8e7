"""The Hub of the tests with one model, `org/model`, a folder, and models that it refuses."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.jobs.push.server import Hub as FakeHub
from tests.jobs.push.server import serve as serve_world
from tests.jobs.push.state import FIRST as COMMIT
from tests.jobs.push.state import FolderRepo, World

__all__ = ["COMMIT", "ERRORS", "FakeHub", "serve"]

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


@contextmanager
def serve(folder: Path, ranges: bool = True) -> Iterator[FakeHub]:
    """Serve the files of `folder`, as they are at the moment, at branch `main` and COMMIT."""
    with serve_world(World({"org/model": FolderRepo(folder)}), ranges=ranges) as server:
        for repo, (status, headers) in ERRORS.items():
            for method in ("GET", "HEAD"):
                pattern = rf"^/(api/models/)?{re.escape(repo)}(/|$)"
                server.fail(
                    "status", pattern, method, times=1000, status=status, headers=dict(headers)
                )
        yield server
