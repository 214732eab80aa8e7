"""Small files written whole or not at all, and checksums.

Each function writes to a hidden temporary file in the target's folder, flushes it to the disk and
renames it: a reader, or a killed run, sees the old file or the new one and never a part.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.system import os_errors

_CHUNK = 8 << 20
_counter = itertools.count()


def create_temporary(path: Path) -> tuple[Path, int]:
    """Create and open (read-write) an empty file beside `path`, named `.<name>.tmp-<pid>-<n>`.

    Its name never ends in a suffix that a loader would pick up. `OSError` when it cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    while True:
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{next(_counter)}")
        try:
            return temporary, os.open(temporary, flags, 0o666)
        except FileExistsError:  # left by a dead process that had our pid
            temporary.unlink()


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut; `OSError` when it fails."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_file(path: Path, needed: int | None = None) -> Iterator[int]:
    """Yield a descriptor to write `path` through; it takes the name `path` when the block succeeds.

    When the block raises, nothing is left behind and an older `path` is untouched. `needed` is the
    size in bytes, named if the disk is full. `OSError` becomes `IrqError`.
    """
    with os_errors("write it", path, needed):
        temporary, fd = create_temporary(path)
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        fsync_folder(path.parent)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data` at the descriptor's position, in as many calls as it takes."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `data` as the file `path`, whole or not at all; `IrqError` when it cannot be done."""
    with atomic_file(path, len(data)) as fd:
        write_all(fd, data)


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` as indented UTF-8 JSON with a final newline, keys in the order given.

    Raises `IrqError` when the file cannot be written and `ValueError` for NaN or infinity.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes_atomic(path, text.encode("utf-8"))


def require_readable(folder: Path, names: Iterable[str]) -> None:
    """Raise `IrqError` for the first of `names` in `folder` that cannot be read."""
    for name in names:
        with os_errors("read it", folder / name), (folder / name).open("rb", buffering=0) as file:
            file.read(1)


def copy_file_atomic(src: Path, dst: Path) -> int:
    """Copy the contents of `src` (symbolic links followed) to `dst`; return the bytes copied.

    Missing parent folders of `dst` are created. Raises `IrqError` naming the file at fault.
    """
    with os_errors("read it", src), src.open("rb", buffering=0) as source:
        size = os.fstat(source.fileno()).st_size
        with os_errors("create its folder", dst):
            dst.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(dst, size) as fd:
            return _copy(source.fileno(), fd, src)


def _copy(source: int, target: int, src: Path) -> int:
    buffer, copied = memoryview(bytearray(_CHUNK)), 0
    while True:
        with os_errors("read it", src):
            count = os.readv(source, [buffer])
        if not count:
            return copied
        write_all(target, buffer[:count])
        copied += count


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it in pieces; `IrqError` on failure."""
    with os_errors("read it", path), path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(content: Path | bytes) -> str:
    """Return the name that git gives to the content of a file; `IrqError` on failure."""
    if isinstance(content, bytes):
        digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
        digest.update(content)
        return digest.hexdigest()
    with os_errors("read it", content), content.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
