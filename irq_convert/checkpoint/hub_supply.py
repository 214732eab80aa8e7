"""Source files fetched from the Hub while a conversion reads: kept in the cache, or streamed.

`CacheSupply` fills the Hub cache, as any download would. `StreamSupply` keeps no more than the
file that is read and the next one, in a folder of its own: a file is deleted when it was read.
Each file is checked against the size and the checksum that the Hub lists for the pinned commit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

from irq_convert.checkpoint.files import git_sha1, sha256_file
from irq_convert.checkpoint.hub import NoBar, RemoteModel
from irq_convert.checkpoint.hub_errors import hub_errors, retrying
from irq_convert.checkpoint.lock import take_folder
from irq_convert.checkpoint.supply import Supply
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError, UsageError

_GLANCE = 0.2  # seconds between two looks at a download that is waited for


class _Stopped(BaseException):
    """The run has ended: leave the download."""


class HubSupply(Supply):
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
                    self.tell(f"downloading {self._progress.percent(self._size(name))}%")
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

    def _download(self, name: str, local_dir: Path | None) -> Path:
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
            problem = self._problem(name, path)
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

    def _problem(self, name: str, path: Path) -> str | None:
        """What is wrong with a downloaded file."""
        listed = self.model.files[name]
        size = path.stat().st_size
        if size != listed.size:
            return f"came with {size} bytes, the Hub lists {listed.size}"
        sum_of = sha256_file if len(checksum := self._checksum(name)) == 64 else git_sha1
        if sum_of(path) != checksum:
            return "came with another checksum than the Hub lists"
        head = (self.heads / name).read_bytes()
        with path.open("rb") as file:
            if file.read(len(head)) != head:
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

    def _size(self, name: str) -> int:
        return self.model.files[name].size


class CacheSupply(HubSupply):
    """Leaves every file in the Hub cache, for the next run."""

    def _fetch(self, name: str) -> None:
        if self.model.cached(name) is None:
            self._download(name, None)

    def room(self, names: Sequence[str]) -> tuple[Path, int]:
        missing = {name for name in names if self.model.cached(name) is None}
        return Path(constants.HF_HUB_CACHE), sum(map(self._size, missing))


class StreamSupply(HubSupply):
    """Keeps the file asked for and the next one in a folder that it takes, and removes at the end.

    The folder is `HF_HOME/irq-convert/streamed/<model>/<commit>/<number>`, the first that no other
    process uses: the next run finds there what an interrupted one left. What lies in the Hub cache
    already is read there and never deleted.
    """

    def __init__(self, model: RemoteModel, heads: Path) -> None:
        # Pieces of streamed files shall not be kept by hf_xet either.
        os.environ.setdefault("HF_XET_CHUNK_CACHE_SIZE_BYTES", "0")
        root = Path(constants.HF_HOME, "irq-convert", "streamed", model.entry, model.revision)
        folder, self._lock = _take_numbered(root)
        super().__init__(model, folder, heads)
        self._wanted: set[str] = set()
        for path in folder.rglob("*.incomplete"):  # huggingface_hub does not continue these
            path.unlink(missing_ok=True)
        for name in model.others:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.symlink_to(heads / name)

    def ahead(self, names: Sequence[str]) -> None:
        self._wanted |= set(names)
        for name in self.model.shards:
            if name not in self._wanted:  # an interrupted run left it, and it is not read next
                self._delete(name)
        super().ahead(names)

    def release(self, names: Sequence[str]) -> None:
        super().release(names)
        for name in names:
            self._wanted.discard(name)
            self._delete(name)

    def close(self, done: bool = True) -> None:
        if self._lock is None:
            return
        super().close(done)
        if done or not any((self.folder / name).is_file() for name in self.model.shards):
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = None
        with contextlib.suppress(OSError):
            for folder in list(self.folder.parents)[:2]:
                folder.rmdir()

    def room(self, names: Sequence[str]) -> tuple[Path, int]:
        sizes = [0 if self.model.cached(name) else self._size(name) for name in names]
        pairs = zip(sizes, [*sizes[1:], 0], strict=True)
        return self.folder, max(map(sum, pairs), default=0)

    def _delete(self, name: str) -> None:
        with os_errors("delete the streamed file", self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def _fetch(self, name: str) -> None:
        path = self.folder / name
        cached = self.model.cached(name)
        if cached is not None:
            with os_errors("link it", path):
                path.unlink(missing_ok=True)
                path.symlink_to(cached)
            return
        if path.is_symlink():  # the cache was emptied since
            path.unlink()
        if path.is_file() and self._problem(name, path) is None:  # an earlier run's
            return
        path.unlink(missing_ok=True)
        self._download(name, self.folder)


def _take_numbered(root: Path) -> tuple[Path, int | None]:
    with os_errors("create it", root):
        root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        try:
            return root / str(number), take_folder(root / str(number))
        except UsageError:  # another process streams there
            continue
    raise AssertionError


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
