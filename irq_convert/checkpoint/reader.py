"""Reading tensor data from shards in tiles of rows, with plain positioned reads and bounded memory.

Never a memory map: pages of a map count as the process's own memory, pages read with pread do not.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

from irq_convert.checkpoint.buffers import tensor_bytes, torch_dtype
from irq_convert.checkpoint.fetcher import ReadOrder
from irq_convert.checkpoint.header import DTYPE_BITS, TensorInfo, matrix_shape
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError

_MAX_READ = 1 << 30  # Linux moves at most 2 GiB a call; stay clear of it


class TileReader:
    """Reads tiles of tensors; safe to share between threads; at most `max_open` files stay open.

    With a `read_order` (see `Checkpoint.read_order`) each file is asked for before it is opened,
    and only those of one tensor stay open: a file that is removed gives its room back at once.
    A context manager; the files are closed at its end. Each method raises `IrqError` naming file
    and tensor when the file ends early or cannot be read.
    """

    def __init__(self, max_open: int = 16, read_order: ReadOrder | None = None) -> None:
        if max_open < 1:
            raise ValueError(f"max_open must be at least 1, got {max_open}")
        self._max_open = max_open if read_order is None else read_order.widest
        self._read_order = read_order
        self._lock = threading.Lock()
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()
        self._closed = False

    def __enter__(self) -> "TileReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. Reading afterwards raises `ValueError`."""
        with self._lock:
            self._closed = True
            while self._files:
                self._files.popitem()[1].close()

    def read_rows(
        self, info: TensorInfo, start: int, stop: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read rows `start` to `stop` of the tensor seen as a matrix (see `matrix_shape`).

        Returns a tensor of shape [stop - start, cols] of the file's dtype: `out` when given (a
        contiguous CPU tensor of that shape and dtype, overwritten), else a new one. For "F4" cols
        counts pairs. Raises `ValueError` for rows that do not exist or an `out` that does not fit.
        """
        rows, cols = matrix_shape(info)
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"tensor {info.name!r} has {rows} rows, not {start}:{stop}")
        dtype = torch_dtype(info.dtype)
        bits = cols * DTYPE_BITS[info.dtype]
        if bits % 8 or (DTYPE_BITS[info.dtype] < 8 and info.shape[-1] % 2):
            raise IrqError(
                f"{info.shard}: tensor {info.name!r}: rows of {cols} {info.dtype} elements do not "
                "fill whole bytes; it can only be copied"
            )
        shape = (stop - start, bits // 8 // dtype.itemsize)
        if info.lazy is not None:
            self._prepare(info)
            if start == stop:
                return torch.empty(shape, dtype=dtype) if out is None else out
            found: torch.Tensor = info.lazy.rows(self, info, start, stop)
            return found if out is None else out.copy_(found)
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        elif tuple(out.shape) != shape or out.dtype != dtype:
            raise ValueError(f"out must be {dtype} {shape}, got {out.dtype} {tuple(out.shape)}")
        self._read_into(info, start * bits // 8, tensor_bytes(out))
        return out

    def read_columns(self, info: TensorInfo, matrix: int, start: int, stop: int) -> torch.Tensor:
        """Read columns `start` to `stop` of matrix number `matrix` of a tensor `[..., rows, cols]`.

        Returns `[rows, stop - start]`; leading dimensions number the matrices as they lie in the
        file. Costs one read for each row, so ask for many columns at a time. Raises `ValueError`
        for what does not exist.
        """
        rows, cols = info.shape[-2:]
        dtype = torch_dtype(info.dtype)
        if not 0 <= start <= stop <= cols or not 0 <= matrix * rows * cols < max(1, info.numel):
            raise ValueError(f"tensor {info.name!r} has no columns {start}:{stop} in {matrix}")
        if info.lazy is not None:
            self._prepare(info)
            columns: torch.Tensor = info.lazy.columns(self, info, matrix, start, stop)
            return columns
        out = torch.empty((rows, stop - start), dtype=dtype)
        view, size = tensor_bytes(out), dtype.itemsize
        first, width = matrix * rows * cols * size, (stop - start) * size
        if width == cols * size:
            self._read_into(info, first, view)
            return out
        with self._open(info):  # so that it stays open from row to row
            for row in range(rows):
                at = first + (row * cols + start) * size
                self._read_into(info, at, view[row * width : (row + 1) * width])
        return out

    def read_tensor(self, info: TensorInfo) -> torch.Tensor:
        """Read a whole tensor in its own shape; for "F4" the last dimension counts pairs."""
        flat = self.read_rows(info, 0, matrix_shape(info)[0])
        if info.dtype == "F4":
            return flat.reshape(*info.shape[:-1], info.shape[-1] // 2)
        return flat.reshape(info.shape)

    def iter_bytes(self, info: TensorInfo, chunk: int = 8 << 20) -> Iterator[memoryview]:
        """Yield the data of a tensor byte for byte, in pieces of at most `chunk` bytes.

        All pieces are views of one buffer: use each before asking for the next.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if info.lazy is not None:
            yield from self._iter_rows(info, chunk)
            return
        buffer = memoryview(bytearray(min(chunk, info.nbytes)))
        for at in range(0, info.nbytes, chunk):
            piece = buffer[: min(chunk, info.nbytes - at)]
            self._read_into(info, at, piece)
            yield piece

    def _iter_rows(self, info: TensorInfo, chunk: int) -> Iterator[memoryview]:
        """`iter_bytes` of a tensor that is put together: the same pieces, cut out of its rows."""
        rows = matrix_shape(info)[0]
        step = max(1, chunk * rows // max(1, info.nbytes))
        buffer, filled = memoryview(bytearray(min(chunk, info.nbytes))), 0
        for start in range(0, rows if info.nbytes else 0, step):
            data = tensor_bytes(self.read_rows(info, start, min(rows, start + step)))
            while data:
                count = min(len(data), len(buffer) - filled)
                buffer[filled : filled + count] = data[:count]
                data, filled = data[count:], filled + count
                if filled == len(buffer):
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]

    def _read_into(self, info: TensorInfo, at: int, view: memoryview) -> None:
        """Fill `view` from byte `at` of the tensor's data."""
        with self._open(info) as fd, os_errors(f"read tensor {info.name!r}", info.shard):
            done = 0
            while done < len(view):
                count = os.preadv(fd, [view[done : done + _MAX_READ]], info.offset + at + done)
                if count == 0:
                    raise IrqError(
                        f"{info.shard}: ends inside tensor {info.name!r}: {len(view) - done} bytes "
                        "missing; the file is cut off or changed while it was read"
                    )
                done += count

    @contextmanager
    def _open(self, info: TensorInfo) -> Iterator[int]:
        """Lend the descriptor of a tensor's file; it stays open as long as someone uses it."""
        file = self._borrow(info)
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1
                if file.closing and not file.users:
                    file.close()

    def _borrow(self, info: TensorInfo) -> "_OpenFile":
        self._prepare(info)
        with self._lock:
            if self._closed:
                raise ValueError("the reader is closed")
            file = self._take(info.shard, info.name)
            file.users += 1
            return file

    def _take(self, path: Path, name: str) -> "_OpenFile":
        """The open file at `path`; called with the lock held."""
        file = self._files.get(path)
        if file is None:
            self._close_down_to(self._max_open - 1)
            with os_errors(f"read tensor {name!r}", path):
                file = self._files[path] = _OpenFile(path)
        self._files.move_to_end(path)
        return file

    def _prepare(self, info: TensorInfo) -> None:
        """Tell the order, outside of the lock: fetching a file takes minutes. Then open them all,
        so that what a tensor is put together from stays while it is read."""
        if self._read_order is None:
            return
        paths = info.files
        with self._lock:
            if self._closed or all(path in self._files for path in paths):
                return
            self._close_down_to(0)
        self._read_order.reach(*paths)
        with self._lock:
            for path in paths if not self._closed else ():
                self._take(path, info.name)

    def _close_down_to(self, count: int) -> None:
        while len(self._files) > count:
            self._files.popitem(last=False)[1].close()


class _OpenFile:
    """A descriptor with a count of its users; closing waits for the last of them."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.users = 0
        self.closing = False
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def close(self) -> None:
        """Close now, or when `users` falls to 0; called with the reader's lock held."""
        self.closing = True
        if not self.users and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
