"""Writing one safetensors file header first, then tile by tile: a shard never sits in memory.

All sizes are known before the data, hence the header is too. The data goes to a hidden temporary
file that takes its final name only when every byte of every tensor has been written: under its
name a shard exists whole or not at all.
"""

import contextlib
import errno
import json
import os
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from irq_convert.checkpoint.disk import require_space
from irq_convert.checkpoint.files import create_temporary, fsync_folder
from irq_convert.checkpoint.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    ShardHeader,
    parse_header,
    tensor_nbytes,
)
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError

_NO_FALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its data; `ValueError` when dtype and shape make no tensor."""
        return tensor_nbytes(self.dtype, self.shape)


def build_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    """Return the first bytes of a file that holds `specs`: length, JSON, padding.

    Data is laid out by falling element size, else in the order given, and starts at a multiple of
    8: so every tensor is aligned to its element size. Equal input gives equal bytes.
    Raises `ValueError` for a name given twice, the name `__metadata__`, or an impossible tensor,
    and `IrqError` when the header would be longer than readers accept.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for spec in sorted(specs, key=lambda spec: -DTYPE_BITS.get(spec.dtype, 0)):
        if spec.name in entries or spec.name == "__metadata__":
            raise ValueError(f"tensor name {spec.name!r} is given twice or reserved")
        end = at + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise IrqError(
            f"a header of {len(text)} bytes is over the limit of {MAX_HEADER_BYTES} that readers "
            "accept; use smaller shards"
        )
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes the safetensors file `path`; the specs fix its layout, tiles come in any order.

    As a context manager it commits at the end of the block, and on an exception removes what was
    written, leaving an older file under `path` as it was. `write` may be called from several
    threads. Space for the whole file is reserved at the start, so a full disk shows at once.
    Raises `IrqError` when the file cannot be created, reserved or written.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        head = build_header(specs, {"format": "pt"} if metadata is None else metadata)
        self.nbytes = len(head) + sum(spec.nbytes for spec in specs)
        self.header: ShardHeader = parse_header(self.path, head[8:], self.nbytes)
        self._written = {name: _Coverage(info.nbytes) for name, info in self.header.tensors.items()}
        self._idle = threading.Condition()
        self._writers = 0
        self._failed = False
        self._fd = -1
        require_space(self.path.parent, self.nbytes, f"write {self.path.name}")
        with os_errors("create it", self.path, self.nbytes):
            self._temporary, self._fd = create_temporary(self.path)
        try:
            with os_errors("reserve space for it", self.path, self.nbytes):
                _reserve(self._fd, self.nbytes)
            self._pwrite(self._fd, memoryview(head), 0)
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._fd >= 0:
            self.commit()
        else:
            self.discard()

    def write(self, name: str, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Write `data` (anything with the buffer protocol) at byte `offset` of tensor `name`.

        Every byte is to be written once. Raises `ValueError` for an unknown tensor, bytes beyond
        its end or bytes written before, and `IrqError` when the disk fails.
        """
        view = memoryview(data).cast("B")
        info = self.header.tensors.get(name)
        if info is None:
            raise ValueError(f"{self.path.name} has no tensor {name!r}")
        with self._idle:
            if self._fd < 0:
                raise ValueError(f"{self.path.name} is already closed")
            self._written[name].add(offset, offset + len(view), name)
            fd = self._fd
            self._writers += 1
        done = False
        try:
            self._pwrite(fd, view, info.offset + offset)
            done = True
        finally:
            with self._idle:
                self._writers -= 1
                self._failed |= not done
                self._idle.notify_all()

    def _pwrite(self, fd: int, view: memoryview, at: int) -> None:
        with os_errors("write it", self.path, self.nbytes):
            while view:
                count = os.pwrite(fd, view[: 1 << 30], at)
                view, at = view[count:], at + count

    def commit(self) -> None:
        """Check that every tensor is complete, flush to the disk and give the file its name.

        Raises `IrqError`, removing the file, when a tensor lacks bytes or the disk fails.
        """
        fd = self._take_fd()
        if fd < 0:
            raise ValueError(f"{self.path.name} is already closed")
        try:
            with os_errors("write it", self.path, self.nbytes):
                try:
                    self._check_complete()
                    os.fsync(fd)
                finally:
                    os.close(fd)
                self._temporary.replace(self.path)
        except BaseException:
            self.discard()
            raise
        with os_errors("flush its folder", self.path):
            fsync_folder(self.path.parent)

    def _check_complete(self) -> None:
        if self._failed:
            raise IrqError(f"{self.path}: an earlier write failed; the file was not kept")
        for name, coverage in self._written.items():
            if coverage.count != coverage.size:
                raise IrqError(
                    f"{self.path}: tensor {name!r} is incomplete: {coverage.count} of "
                    f"{coverage.size} bytes written; the file was not kept"
                )

    def _take_fd(self) -> int:
        """Refuse further writes, wait for those under way, and hand over the descriptor."""
        with self._idle:
            fd, self._fd = self._fd, -1
            self._idle.wait_for(lambda: not self._writers)
        return fd

    def discard(self) -> None:
        """Remove the temporary file; nothing happens after `commit`."""
        fd = self._take_fd()
        if fd >= 0:
            os.close(fd)
        with contextlib.suppress(OSError):
            self._temporary.unlink()


class _Coverage:
    """Which bytes of a tensor have been written, as sorted disjoint intervals."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._parts: list[tuple[int, int]] = []

    def add(self, start: int, stop: int, name: str) -> None:
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"tensor {name!r} has {self.size} bytes, not {start}:{stop}")
        if start == stop:
            return
        at = bisect_left(self._parts, (start, stop))
        before = self._parts[at - 1] if at else (0, 0)
        after = self._parts[at] if at < len(self._parts) else (self.size, self.size)
        if before[1] > start or after[0] < stop:
            raise ValueError(f"tensor {name!r}: bytes {start}:{stop} were written before")
        self.count += stop - start
        low = at - 1 if at and before[1] == start else at
        high = at + 1 if at < len(self._parts) and after[0] == stop else at
        merged = (before[0] if low < at else start, after[1] if high > at else stop)
        self._parts[low:high] = [merged]


def _reserve(fd: int, size: int) -> None:
    """Give the file its full size and, where the file system can, its blocks."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
    os.ftruncate(fd, size)
