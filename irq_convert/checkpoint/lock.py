"""Locks on a working folder: one run owns it, and further processes of that run are its members.

Both are `flock`s, which the kernel drops with the process, however it ends: a lock file without a
holder means nothing. A new owner waits for members that a killed run has left behind.
"""

import fcntl
import os
import time
from pathlib import Path

from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import UsageError

MEMBERS_NAME = ".members.lock"
_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
_PAUSE = 0.05


class Held:
    """A lock that may be held: whoever gives it to `take_folder` knows at any moment, signals too.

    A signal may come after a function is done and before its caller has what it returned.
    """

    fd: int | None = None

    def release(self) -> None:
        """Give the lock up; nothing happens where it is not held."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def take_folder(folder: Path, held: Held | None = None) -> int:
    """Create `folder` if needed and lock it; return the descriptor of the lock, `held.fd`.

    Raises `UsageError` when another run holds it, or when no run made it, and `IrqError` when the
    disk refuses.
    """
    held = held or Held()
    with os_errors("create it", folder):
        while True:
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise UsageError(f"{folder}: in the way; remove it")
            folder.mkdir(exist_ok=True)
            path = folder / LOCK_NAME
            try:
                if not path.exists() and any(folder.iterdir()) and not path.exists():
                    raise UsageError(
                        f"{folder}: exists, not empty, not made by a run; rename or remove it"
                    )
                held.fd = os.open(path, _FLAGS, 0o666)
            except FileNotFoundError:  # the other run finished and removed the folder
                continue
            try:
                mine = _take(held.fd, path, folder)
            except BaseException:
                held.release()
                raise
            if mine:
                return held.fd
            held.release()


def _take(fd: int, path: Path, folder: Path) -> bool:
    """Lock `fd`; False when the file is no longer the one at `path` and all must start over."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        raise UsageError(
            f"{folder}: in use by a run that is not finished (process {owner or 'unknown'}); "
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


def unused(folder: Path) -> bool:
    """Whether nobody holds the lock of `folder`, or it has none."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def join_folder(folder: Path) -> int:
    """Become a member of the run that owns `folder`; return the descriptor to close at the end."""
    path = folder / MEMBERS_NAME
    with os_errors("lock it", path):
        fd = os.open(path, _FLAGS, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
        except BaseException:
            os.close(fd)
            raise
    return fd


def await_members(folder: Path, seconds: float) -> bool:
    """Wait until `folder` has no members, at most for `seconds`; whether that is so."""
    path = folder / MEMBERS_NAME
    with os_errors("lock it", path):
        if not path.exists():
            return True
        fd = os.open(path, _FLAGS, 0o666)
        try:
            end = time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() >= end:
                        return False
                    time.sleep(_PAUSE)
                else:
                    return True
        finally:
            os.close(fd)
