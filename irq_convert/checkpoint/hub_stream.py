"""Source files fetched from the Hub while a conversion reads, and deleted when they were read."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants

from irq_convert.checkpoint.hub import RemoteModel
from irq_convert.checkpoint.hub_fetcher import HubFetcher
from irq_convert.checkpoint.lock import take_folder
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError, UsageError


class StreamFetcher(HubFetcher):
    """Keeps the file asked for and the next one in a folder that it takes, and removes at the end.

    The folder is `HF_HOME/irq-convert/streamed/<model>/<commit>/<number>`, the first that no other
    process uses: the next run finds there what an interrupted one left, and one that comes to its
    end removes what nobody uses. What lies in the Hub cache already is read there, never deleted.
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
            path.symlink_to((heads / name).absolute())  # HF_HOME may be relative

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
        if done:
            _sweep(self.folder.parent)
        with contextlib.suppress(OSError):
            for folder in list(self.folder.parents)[:2]:
                folder.rmdir()

    def room(self, *orders: Sequence[Sequence[str]]) -> tuple[Path, int]:
        return self.folder, sum(map(self._two, orders))

    def _two(self, groups: Sequence[Sequence[str]]) -> int:
        """Bytes of the largest two neighbours among `groups`, each file counted once."""
        pairs = zip(groups, [*groups[1:], ()], strict=True)
        both = ({*one, *other} for one, other in pairs)
        return max((sum(map(self._missing, names)) for names in both), default=0)

    def _missing(self, name: str) -> int:
        return 0 if self.model.cached(name) else self.size(name)

    def _delete(self, name: str) -> None:
        with os_errors("delete the streamed file", self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def _fetch(self, name: str) -> None:
        path = self.folder / name
        cached = self.model.cached(name)
        if cached is not None:
            with os_errors("link it", path):
                path.unlink(missing_ok=True)
                path.symlink_to(cached.absolute())
            return
        if path.is_symlink():  # the cache was emptied since
            path.unlink()
        if path.is_file() and self.problem(name, path) is None:  # an earlier run's
            return
        path.unlink(missing_ok=True)
        self.download(name, self.folder)


def _take_numbered(root: Path) -> tuple[Path, int | None]:
    with os_errors("create it", root):
        root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        try:
            return root / str(number), take_folder(root / str(number))
        except UsageError:  # another process streams there
            continue
    raise AssertionError


def _sweep(root: Path) -> None:
    """Remove what processes that were killed have left: there may have been more of them."""
    with contextlib.suppress(OSError):
        for folder in list(root.iterdir()):
            with contextlib.suppress(IrqError):  # in use
                lock = take_folder(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
