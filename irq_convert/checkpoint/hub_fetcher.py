"""Source files fetched from the Hub while a conversion reads, into the cache of all downloads.

Each file is checked against the size and the checksum that the Hub lists for the pinned commit.
`hub_stream` has the fetcher that keeps no file.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from irq_convert.checkpoint.fetcher import Fetcher
from irq_convert.checkpoint.files import git_sha1, sha256_file
from irq_convert.checkpoint.hub import NoBar, RemoteModel
from irq_convert.checkpoint.hub_errors import hub_errors, retrying
from irq_convert.errors import IrqError

_GLANCE = 0.2  # seconds between two looks at a download that is waited for


class _Stopped(BaseException):
    """The run has ended: leave the download."""


class HubFetcher(Fetcher):
    """Fetches files of `model` into `folder`, one at a time, on a thread of its own.

    `heads` holds the file headers that the conversion was planned by.
    """

    def __init__(self, model: RemoteModel, folder: Path, heads: Path) -> None:
        super().__init__()
        self.model, self.folder, self.heads = model, folder, heads
        self._jobs: dict[str, Future[None]] = {}
        self._last: threading.Thread | None = None
        self._stopped = threading.Event()
        self._progress = _Progress(self._stopped)

    def ensure(self, names: Sequence[str]) -> None:
        self.ahead(names)
        for name in names:
            waited = False
            while not self._jobs[name].done() and not self._stopped.is_set():
                wait([self._jobs[name]], timeout=_GLANCE)
                if not self._jobs[name].done():
                    waited = True
                    self.tell(f"downloading {self._progress.percent(self.size(name))}%")
            if self._stopped.is_set():
                raise IrqError(f"{self.model.repo_id}: {name}: not fetched: the run has ended")
            if waited:
                self.tell("")
            try:
                self._jobs[name].result()
            except BaseException:
                self._jobs.pop(name, None)  # so that it can be tried again
                raise

    def ahead(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._jobs:
                self._start(name)

    def release(self, names: Sequence[str]) -> None:
        for name in names:
            self._jobs.pop(name, None)

    def stop(self) -> None:
        self._stopped.set()  # a transfer ends with its next piece of data

    def close(self, done: bool = True) -> None:
        self.stop()
        if self._last is not None:
            self._last.join(timeout=10)  # a daemon: it never keeps the process alive

    def _start(self, name: str) -> None:
        """Fetch `name` when the one before it is there."""
        job: Future[None] = Future()
        before = self._last

        def work() -> None:
            if before is not None:
                before.join()
            try:
                self._pause(0)
                self._progress.done = 0
                with hub_errors(self.model.repo_id, self.model.revision):
                    self._fetch(name)
            except BaseException as error:
                job.set_exception(error)
            else:
                job.set_result(None)

        self._jobs[name] = job
        self._last = threading.Thread(target=work, name="irq-hub", daemon=True)
        self._last.start()

    def _fetch(self, name: str) -> None:
        raise NotImplementedError

    def download(self, name: str, local_dir: Path | None) -> Path:
        """Download and check a file; one that is damaged is downloaded once more, then refused."""
        for force in (False, True):
            fetch = partial(
                hf_hub_download,
                self.model.repo_id,
                name,
                revision=self.model.revision,
                local_dir=local_dir,
                force_download=force,
                tqdm_class=self._progress.bar,
            )
            path = Path(str(retrying(fetch, wait=self._pause)))
            problem = self.problem(name, path)
            if problem is None:
                return path
            _remove_blob(path)
        raise IrqError(
            f"{self.model.repo_id}: {name}: {problem}, twice: something on the way to the Hub "
            "changes the data (a proxy?); try again later or from another network"
        )

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise _Stopped

    def problem(self, name: str, path: Path) -> str | None:
        """What is wrong with a downloaded file."""
        listed = self.model.files[name]
        size = path.stat().st_size
        if size != listed.size:
            return f"came with {size} bytes, the Hub lists {listed.size}"
        sum_of = sha256_file if len(checksum := self._checksum(name)) == 64 else git_sha1
        if sum_of(path) != checksum:
            return "came with another checksum than the Hub lists"
        read = self.model.source_format.read_header
        planned, found = read(self.heads / name, listed.size), read(path, None)
        if found.tensors != {n: info.moved(lambda _: path) for n, info in planned.tensors.items()}:
            return "has another header than the one it was planned by"
        return None

    def _checksum(self, name: str) -> str:
        """SHA-256 of a large file, git's SHA-1 of another; a cached list of files lacks the first.

        The Hub gives the same as the ETag of the file.
        """
        listed = self.model.files[name].lfs
        if listed is not None:
            return listed.sha256
        url = hf_hub_url(self.model.repo_id, name, revision=self.model.revision)
        found = retrying(partial(get_hf_file_metadata, url), wait=self._pause)
        return found.etag or ""

    def size(self, name: str) -> int:
        """As the Hub lists it."""
        return self.model.files[name].size


class CacheFetcher(HubFetcher):
    """Leaves every file in the Hub cache, for the next run."""

    def _fetch(self, name: str) -> None:
        if self.model.cached(name) is None:
            self.download(name, None)

    def room(self, *orders: Sequence[Sequence[str]]) -> tuple[Path, int]:
        names = {name for groups in orders for names in groups for name in names}
        missing = [name for name in names if self.model.cached(name) is None]
        return Path(constants.HF_HUB_CACHE), sum(map(self.size, missing))


class _Progress:
    """Counts the bytes of the transfer that is running; ends it when the run has ended."""

    def __init__(self, stopped: threading.Event) -> None:
        self.done = 0
        counter = self

        class Bar(NoBar):
            """Draws nothing: the run's own bar says how far a download is."""

            def __init__(self, *args: Any, **named: Any) -> None:
                # hf_xet counts twice, what it received and what it wrote.
                self.counts = not str(named.get("name")).endswith(".transfer")
                super().__init__(*args, **named)

            def update(self, n: float | None = 1) -> bool | None:
                if stopped.is_set():
                    raise _Stopped
                if self.counts:
                    counter.done += int(n or 0)
                return None

        self.bar = Bar

    def percent(self, size: int) -> int:
        return min(99, 100 * self.done // max(1, size))


def _remove_blob(path: Path) -> None:
    """Delete a damaged download, in the cache the blob that `path` links to as well."""
    with contextlib.suppress(OSError):
        real = path.resolve()
        path.unlink()
        if real != path and real.parent.name == "blobs":
            real.unlink()
