"""Room for the output: free space, output folders that may be used, folders that appear whole.

A run works in `<out>.partial` beside its target:

    <out>.partial/.output.lock    held by the run
    <out>.partial/records/        what it notes to be continued (see `irq_convert.jobs.common`)
    <out>.partial/files/          becomes <out>, in one rename, when everything is there

So `<out>` never holds anything but the result, and a killed run leaves only `<out>.partial`, which
the next run replaces or continues.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from irq_convert.checkpoint.files import fsync_folder
from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.checkpoint.lock import Held, await_members, take_folder, unused
from irq_convert.checkpoint.swap import put_in_place, restore_replaced
from irq_convert.checkpoint.system import format_bytes, free_bytes, os_errors
from irq_convert.errors import IrqError, UsageError

_FILES, _RECORDS, _PARTIAL = "files", "records", ".partial"
_STRAGGLERS = 60.0
"""Seconds that processes of a run that was killed are given to come to their end."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `IrqError` unless `needed` bytes are free where `folder` is or will be.

    `what` completes "not enough space to ..." in the message.
    """
    with os_errors("ask for its free space", folder):
        free = free_bytes(folder)
    if needed > free:
        raise IrqError(
            f"{folder}: not enough space to {what}: {format_bytes(needed)} needed, "
            f"{format_bytes(free)} free; free some or choose a folder on another disk"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_output(out: Path, source: Path | None, overwrite: bool) -> Path:
    """Return the resolved output folder if it may be written to; touch nothing.

    Raises `UsageError` when `out` is a file, is not empty (unless `overwrite`), is the root of a
    mounted file system, or is, holds or lies inside the folder `source`.
    """
    with os_errors("use it as output folder", out):
        real = Path(out).resolve()
        if real.exists() and not real.is_dir():
            raise UsageError(f"{out}: a file, not a folder; choose another output folder")
        if source is not None:
            _check_apart(out, real, Path(source))
        if real.is_dir() and any(real.iterdir()) and not overwrite:
            raise UsageError(
                f"{out}: not empty; choose another folder, or --overwrite to replace it"
            )
        if real.is_mount():
            raise UsageError(
                f"{out}: a mount point, which cannot be replaced; give a folder inside it"
            )
    return real


def _check_apart(out: Path, real: Path, source: Path) -> None:
    origin = source.resolve()
    if real == origin:
        raise UsageError(f"{out}: the source itself; choose another output folder")
    if real.is_relative_to(origin):
        raise UsageError(f"{out}: inside the source {source}; choose a folder outside it")
    if origin.is_relative_to(real):
        raise UsageError(f"{out}: holds the source {source}; choose a folder beside it")


def partial_folder(out: Path) -> Path:
    """The folder `<out>.partial`, for an `out` that is resolved as a run resolves it."""
    with os_errors("look at it", out):
        real = Path(out).resolve()
    return real.with_name(real.name + _PARTIAL)


@dataclass
class Staging:
    """The working folder `root` of one run, which holds its lock.

    `files` becomes the output when the run ends well. When it fails, the folder is removed, or with
    `keep` left for the next run.
    """

    root: Path
    keep: bool

    @property
    def files(self) -> Path:
        return self.root / _FILES

    @property
    def records(self) -> Path:
        return self.root / _RECORDS

    def clear(self) -> None:
        """Empty the folder, records first: a kill in the middle leaves files that nobody trusts."""
        with os_errors("empty it", self.root):
            _empty(self.root)
            self.files.mkdir()
            fsync_folder(self.root)
            fsync_folder(self.root.parent)

    def keep_only(self, names: Collection[str]) -> None:
        """Remove every file but those of `names`, and what is half written."""
        with os_errors("empty it", self.root):
            for path in self.files.iterdir():
                if path.name not in names or not path.is_file() or path.is_symlink():
                    _discard(path)
        self.remove_temporary()

    def remove_temporary(self) -> None:
        """Remove what is half written."""
        with os_errors("empty it", self.root):
            for path in list(self.root.rglob(".*.tmp-*")):
                path.unlink(missing_ok=True)


@contextmanager
def output_folder(out: Path, source: Path | None = None, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `out` when the block ends without error.

    When the block raises, nothing is left. Raises as `staging_folder`.
    """
    with staging_folder(out, source, overwrite) as staging:
        staging.keep = False
        staging.clear()
        yield staging.files


@contextmanager
def staging_folder(
    out: Path, source: Path | None = None, overwrite: bool = False
) -> Iterator[Staging]:
    """Yield the working folder of a run, locked by this process, with what an earlier run left.

    Its `files` become `out` when the block ends without error. When the block raises, the folder is
    removed, unless `keep` is set, which it is at first for a folder that was there. Folders above
    `out` are created as needed and removed again with it. With `overwrite` an existing `out` stays
    untouched until the new one is complete, then is moved aside, replaced and deleted; a kill in
    the middle of this loses neither: the old one is put back by the next run.

    Raises `UsageError` as `check_output`, when another run holds the folder, or when a folder of
    its name exists that no run made; `IrqError` when the disk refuses.
    """
    real = check_output(out, source, overwrite)
    root = partial_folder(out)
    made = _missing(real.parent)
    staging = Staging(root, keep=root.exists())  # a request refused below costs no earlier run
    held = Held()
    try:
        with os_errors("create it", real.parent):
            real.parent.mkdir(parents=True, exist_ok=True)
        take_folder(root, held)
        _await_stragglers(root)
        restore_replaced(real, staging.files)
        check_output(out, source, overwrite)  # again, now that no other run can interfere
        yield staging
        put_in_place(staging.files, real)
        _remove(root)
    except BaseException:
        mine = held.fd is not None or (root.is_dir() and _holds_nothing(root))
        if mine and not staging.keep:
            _remove(root)
        _remove_empty(made)
        raise
    finally:
        held.release()


def remove_leftovers(out: Path) -> None:
    """Clear up after a run to `out` that was killed while its files took that name, or after.

    Its working folder is removed, and what `out` was before is put back where nothing has replaced
    it, else deleted. Nothing happens to any other folder, or while a run works in it.
    """
    root = partial_folder(out)
    with contextlib.suppress(OSError):
        names = {path.name for path in root.iterdir()} if root.is_dir() else set()
        if root.is_dir() and not names:
            root.rmdir()
        elif LOCK_NAME in names and _FILES not in names and unused(root):
            _remove(root)
    with contextlib.suppress(OSError, IrqError):
        if not root.exists() or unused(root):
            restore_replaced(root.with_name(root.name.removesuffix(_PARTIAL)), root / _FILES)


def _missing(folder: Path) -> list[Path]:
    """`folder` and those above it that do not exist, the innermost first."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _await_stragglers(root: Path) -> None:
    """Processes of a killed run on several may still be writing."""
    if not await_members(root, _STRAGGLERS):
        raise UsageError(
            f"{root}: processes of an earlier run still work in it, on this host or another; "
            "end them, or wait for them"
        )


def _holds_nothing(root: Path) -> bool:
    """Nothing but a lock that nobody holds: a signal may come before the lock is taken."""
    with contextlib.suppress(OSError):
        return all(path.name == LOCK_NAME for path in root.iterdir()) and unused(root)
    return False


def _empty(root: Path) -> None:
    """Remove everything but the lock, the records first."""
    found = sorted(root.iterdir(), key=lambda path: path.name != _RECORDS)
    for path in found:
        if path.name != LOCK_NAME:
            _discard(path)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _remove(root: Path) -> None:
    """Remove a working folder, its lock last: without it the folder would be nobody's."""
    with contextlib.suppress(OSError):
        _empty(root)
        (root / LOCK_NAME).unlink(missing_ok=True)
        try:
            root.rmdir()
        except OSError:
            (root / LOCK_NAME).touch()
            raise
