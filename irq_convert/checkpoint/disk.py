"""Room for the output: free space, output folders that may be used, folders that appear whole.

`output_folder` gives a run a staging folder `<out>.partial` beside the target and renames it at the
end. A killed run therefore leaves only `<out>.partial`, which the next run replaces or resumes.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from irq_convert.checkpoint.files import fsync_folder
from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.checkpoint.system import format_bytes, free_bytes, os_errors
from irq_convert.errors import IrqError, UsageError


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
        )


def check_output(out: Path, source: Path | None, overwrite: bool) -> Path:
    """Return the resolved output folder if it may be written to; touch nothing.

    Raises `UsageError` when `out` is a file, is not empty (unless `overwrite`), is the current
    root of a mounted file system, or is, holds or lies inside the folder `source`.
    """
    with os_errors("use it as output folder", out):
        real = Path(out).resolve()
        if real.exists() and not real.is_dir():
            raise UsageError(f"{out}: a file, not a folder; choose another output folder")
        if source is not None:
            _check_apart(out, real, Path(source))
        if real.is_dir() and any(real.iterdir()) and not overwrite:
            raise UsageError(f"{out}: not empty; choose another folder or allow overwriting it")
    return real


def _check_apart(out: Path, real: Path, source: Path) -> None:
    origin = source.resolve()
    if real == origin:
        raise UsageError(f"{out}: the source itself; choose another output folder")
    if real.is_relative_to(origin):
        raise UsageError(f"{out}: inside the source {source}; choose a folder outside it")
    if origin.is_relative_to(real):
        raise UsageError(f"{out}: holds the source {source}; choose a folder beside it")


def prepare_output(out: Path, source: Path | None, overwrite: bool) -> bool:
    """Make sure the folder `out` exists and may be written into; return whether it was created.

    For small outputs that are written file by file; `output_folder` is the way for whole
    checkpoints. Raises as `check_output`, and `IrqError` when the folder cannot be created or
    written to. After a failed run pass the result to `discard_output`.
    """
    real = check_output(out, source, overwrite)
    with os_errors("create it", out):
        created = not real.exists()
        real.mkdir(parents=True, exist_ok=True)
    if not os.access(real, os.W_OK | os.X_OK):
        raise IrqError(f"{out}: cannot write into it: permission denied; choose another folder")
    return created


def discard_output(out: Path, created: bool) -> None:
    """Remove the folder `out` and all in it if `prepare_output` created it; else do nothing."""
    if created:
        shutil.rmtree(out, ignore_errors=True)


@contextmanager
def output_folder(
    out: Path,
    source: Path | None = None,
    overwrite: bool = False,
    *,
    resume: bool = False,
    keep_partial: bool = False,
) -> Iterator[Path]:
    """Yield an empty staging folder to fill; it becomes `out` when the block ends without error.

    The staging folder is `<out>.partial`, locked by this process, so that two runs cannot share
    it. One left by a killed run is emptied first, or with `resume` handed over as it is (without
    unfinished temporary files). When the block raises, the staging folder is removed, or with
    `keep_partial` kept for a later `resume`. Folders above `out` are created as needed and removed
    again on failure. With `overwrite` an existing `out` stays untouched until the new one is
    complete, then is moved aside, replaced and deleted; a kill in the middle of this loses neither:
    the old one is put back by the next run.

    Raises `UsageError` as `check_output`, when another run holds the staging folder, or when a
    folder of its name exists that no run made; `IrqError` when the disk refuses.
    """
    real = check_output(out, source, overwrite)
    if real.is_mount():
        raise UsageError(f"{out}: a mount point, which cannot be replaced; give a folder inside it")
    staging = real.with_name(real.name + ".partial")
    made = _make_parents(real.parent)
    keep = staging.exists()  # a request refused below must not cost an earlier run its work
    try:
        lock = _lock_staging(staging)
    except BaseException:
        if not keep:
            _remove_unused(staging)
        _remove_empty(made)
        raise
    try:
        _restore_replaced(real)
        check_output(out, source, overwrite)  # again, now that no other run can interfere
        _clear(staging, resume)
        keep = keep_partial
        yield staging
        _swap(staging, real)
    except BaseException:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
            _remove_empty(made)
        raise
    finally:
        os.close(lock)


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` with its parents; return those created, the innermost first."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    with os_errors("create it", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _remove_unused(staging: Path) -> None:
    """Remove a staging folder in which there is nothing but a lock that nobody holds.

    A signal may come between the making of the folder and the taking of its lock.
    """
    with contextlib.suppress(OSError):
        if any(path.name != LOCK_NAME for path in staging.iterdir()):
            return
        path = staging / LOCK_NAME
        if path.exists():
            fd = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)
        staging.rmdir()


def _lock_staging(staging: Path) -> int:
    """Create the staging folder if needed and lock it; return the descriptor of the lock."""
    with os_errors("create it", staging):
        while True:
            if staging.is_symlink() or (staging.exists() and not staging.is_dir()):
                raise UsageError(f"{staging}: in the way; remove it")
            staging.mkdir(exist_ok=True)
            path = staging / LOCK_NAME
            if not path.exists() and any(staging.iterdir()) and not path.exists():
                raise UsageError(
                    f"{staging}: exists, not empty, not made by a run; rename or remove it"
                )
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            except FileNotFoundError:  # the other run finished and renamed the folder
                continue
            try:
                mine = _take(fd, path, staging)
            except BaseException:
                os.close(fd)
                raise
            if mine:
                return fd
            os.close(fd)


def _take(fd: int, path: Path, staging: Path) -> bool:
    """Lock `fd`; False when the file is no longer the one at `path` and all must start over."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        raise UsageError(
            f"{staging}: in use by a run that is not finished (process {owner or 'unknown'}); "
            "wait for it or choose another output folder"
        ) from None
    try:
        same = os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
    if same:
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return same


def _clear(staging: Path, resume: bool) -> None:
    """Remove what an earlier run left: all of it, or for `resume` its temporary files only."""
    with os_errors("empty it", staging):
        for path in list(staging.rglob(".*.tmp-*") if resume else staging.iterdir()):
            if path.name == LOCK_NAME:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _replaced(real: Path) -> list[Path]:
    """Return folders that `_swap` of a killed run moved aside and did not delete."""
    pattern = re.compile(re.escape(real.name) + r"\.replaced-\d+")
    return sorted(path for path in real.parent.iterdir() if pattern.fullmatch(path.name))


def _restore_replaced(real: Path) -> None:
    with os_errors("recover it", real):
        for aside in _replaced(real):
            if real.exists():
                shutil.rmtree(aside)
            else:
                aside.rename(real)


def _swap(staging: Path, real: Path) -> None:
    """Give the finished staging folder the name `real`, moving an older folder out of the way."""
    aside = real.with_name(f"{real.name}.replaced-{os.getpid()}")
    with os_errors("put the finished folder there", real):
        fsync_folder(staging)
        old = real.is_dir() and any(real.iterdir())
        if old:
            real.rename(aside)
        try:
            staging.rename(real)
        except BaseException:
            if old:
                aside.rename(real)
            raise
        (real / LOCK_NAME).unlink()
        fsync_folder(real.parent)
    if old:
        shutil.rmtree(aside, ignore_errors=True)
