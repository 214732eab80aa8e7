"""Operating-system errors and byte counts in words: what a user can act on becomes one line.

The rest of this package wraps each group of system calls in `os_errors`, so that a full disk or a
missing permission is reported with the file, the cause and the way out instead of a traceback.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from irq_convert.errors import IrqError, UsageError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_REASONS = {
    errno.EACCES: "permission denied; check the owner and mode of the file and its folder",
    errno.EPERM: "permission denied; check the owner and mode of the file and its folder",
    errno.EROFS: "the file system is read-only; choose a folder on another one",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.EFBIG: "the file would be larger than this file system or `ulimit -f` allows",
    errno.ENAMETOOLONG: "the file name is too long",
    errno.EMFILE: "too many open files; raise `ulimit -n`",
    errno.EXDEV: "the two paths are on different file systems; choose folders on the same one",
    errno.EIO: "input/output error; the disk or its connection is failing",
    errno.ELOOP: "the symbolic links form a loop",
}


def short_bytes(count: int) -> str:
    """Return `count` bytes in the unit that reads best, in powers of ten: `1.23 MB`."""
    # A unit begins where the one below would be rounded to 1000.00.
    for unit, size, first in (("GB", 1e9, 999.995e6), ("MB", 1e6, 999.995e3), ("kB", 1e3, 1e3)):
        if count >= first:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def format_bytes(count: int) -> str:
    """Return `count` bytes in words, exact and readable: `1234567 bytes (1.23 MB)`."""
    short = short_bytes(count)
    return short if short.endswith("bytes") else f"{count} bytes ({short})"


def existing_parent(path: Path) -> Path:
    """Return `path` itself or its nearest parent that exists."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() fails on link loops
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_bytes(folder: Path) -> int:
    """Return the bytes an ordinary user may still write on the file system of `folder`."""
    return shutil.disk_usage(existing_parent(folder)).free


def explain_os_error(error: OSError, action: str, path: Path, needed: int | None = None) -> str:
    """Return one line for `error`: what failed, on which path, why, and the way out.

    `needed` is the number of bytes the action wanted to write; it is named when the disk is full.
    """
    if error.errno in _NO_SPACE:
        try:
            left = f", {format_bytes(free_bytes(path.parent))} free"
        except OSError:
            left = ""
        wanted = "" if needed is None else f" ({format_bytes(needed)} needed{left})"
        return (
            f"{path}: cannot {action}: no space left on the file system{wanted}; "
            "free some or choose a folder on another disk"
        )
    reason = _REASONS.get(error.errno or 0) or error.strerror or " ".join(str(error).split())
    return f"{path}: cannot {action}: {reason}"


@contextmanager
def os_errors(action: str, path: Path, needed: int | None = None) -> Iterator[None]:
    """Run the block; an `OSError` in it becomes an `IrqError` made by `explain_os_error`."""
    try:
        yield
    except OSError as error:
        raise IrqError(explain_os_error(error, action, path, needed)) from error


def require_utf8(path: Path, name: str) -> None:
    """Raise `IrqError` unless `name`, of `path` or in it, is UTF-8, as records are."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise IrqError(f"{path}: its name is not UTF-8, as records need it: give another") from None


def expand_home(path: str | Path) -> Path:
    """`path` with the folder that a leading `~` or `~user` means; `UsageError` for no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{path}: no such folder: nobody of that name has a home here; write the path out"
        ) from None
