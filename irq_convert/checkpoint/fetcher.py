"""Bringing the files of a source to the disk as a run reads them: nothing to do for a local folder.

A `Fetcher` fetches and removes files; a `ReadOrder` tells it what to do while a run reads its
source from the first tensor to the last. `TileReader` tells the order what it reads, so that
reading can begin with the first file of a shard and a streamed file can go in the middle of one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby
from pathlib import Path
from types import TracebackType

from irq_convert.checkpoint.disk import require_space
from irq_convert.checkpoint.system import existing_parent, format_bytes, os_errors


class Fetcher:
    """Files of a source by relative name; this one serves a local folder: everything is there.

    A context manager: a run that fetches files closes its fetcher, whether it ends well or not.
    Without `keep` nothing stays for another run when it does not.
    `tell` is called, from any thread, with a few words while a file is waited for, and with ""
    when reading goes on.
    """

    def __init__(self) -> None:
        self.tell: Callable[[str], None] = lambda text: None
        self.keep = True

    def ensure(self, names: Sequence[str]) -> None:
        """Return when all of `names` are complete on the disk; `IrqError` when they cannot be."""

    def ahead(self, names: Sequence[str]) -> None:
        """Start to fetch `names`, in this order, in the background; `ensure` tells of failures."""

    def release(self, names: Sequence[str]) -> None:
        """Take note that `names` are not read again: a streamed file is removed from the disk."""

    def room(self, *orders: Sequence[Sequence[str]]) -> tuple[Path, int]:
        """The folder that fetching files writes to, and the bytes that they take there at most.

        `orders` are the groups of names that each process on this host reads, in its order.
        """
        return Path(), 0

    def stop(self) -> None:
        """Give up what is being fetched: an `ensure` that waits in another thread raises."""

    def close(self, done: bool = True) -> None:
        """End fetching; `done` is False when the run may be continued: keep what is here."""

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(done=kind is None or not self.keep)


class ReadOrder:
    """Drives the fetcher of `folder` along `order`: the files of each tensor, as a run reads them.

    `reach(*paths)` comes before the first read of a tensor's files: earlier files that are not
    needed again are released, these are complete when it returns, and the next are being fetched.
    Reading out of order costs time and nothing else. See `Checkpoint.read_order`. As a context
    manager it stops its fetcher when the block fails, so that a reader in another thread does not
    wait on.
    """

    def __init__(self, fetcher: Fetcher, folder: Path, order: Iterable[Sequence[str]]) -> None:
        self.fetcher = fetcher
        self.folder = folder
        self.groups = tuple(group for group, _ in groupby(map(tuple, order)))
        self._at = 0
        self._gone: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> ReadOrder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.fetcher.stop()

    @property
    def widest(self) -> int:
        """The most files that one tensor lies in."""
        return max(map(len, self.groups), default=1)

    def reach(self, *paths: Path) -> None:
        """Prepare for reading the files `paths`; raises `IrqError` when one cannot be had."""
        group = tuple(path.relative_to(self.folder).as_posix() for path in paths)
        with self._lock:
            if group in self.groups[self._at :]:
                self._at = self.groups.index(group, self._at)
            left = list(chain.from_iterable(self.groups[self._at :]))
            passed = set(chain.from_iterable(self.groups[: self._at]))
            done = passed - set(left) - self._gone - set(group)
            self._gone |= done
            self._gone -= set(group)
            self.fetcher.release(sorted(done))
            following = next((other for other in left if other not in group), None)
            self.fetcher.ahead([*group] if following is None else [*group, following])
            self.fetcher.ensure([*group])


def require_room(out: Path, needed: int, read_orders: Sequence[ReadOrder]) -> None:
    """Raise `IrqError` unless the disks hold `needed` bytes of output and what is fetched.

    `read_orders`, at least one, are of the processes on this host, with equal fetchers.
    """
    folder, fetched = read_orders[0].fetcher.room(*(each.groups for each in read_orders))
    if fetched and _same_disk(out, folder):
        what = f"write the artifact and fetch the source ({format_bytes(fetched)})"
        require_space(out, needed + fetched, what)
        return
    require_space(out, needed, "write the artifact")
    if fetched:
        require_space(folder, fetched, "fetch the source")


def _same_disk(one: Path, other: Path) -> bool:
    with os_errors("ask for its free space", one):
        return existing_parent(one).stat().st_dev == existing_parent(other).stat().st_dev
