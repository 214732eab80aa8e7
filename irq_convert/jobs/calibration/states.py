"""Hidden states of many windows, in files: what a layer is given, a chunk of windows at a time.

Room is taken when a file is made, so that a full disk is met before the work and not within it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from irq_convert.checkpoint.buffers import tensor_bytes
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError

CHUNK_TOKENS = 2048
"""Tokens that a layer is run on at once, unless one window has more."""


@dataclass
class StateFile:
    """Float32 `[windows, tokens, width]` in the file `path`, open as `fd` until it is removed."""

    path: Path
    fd: int
    windows: int
    tokens: int
    width: int

    def write(self, start: int, states: torch.Tensor) -> None:
        """Put `states`, `[n, tokens, width]`, in the place of the windows from `start` on."""
        data = tensor_bytes(states.detach().to("cpu", torch.float32).contiguous())
        at = start * self.tokens * self.width * 4
        with os_errors("write hidden states", self.path, len(data)):
            while data:
                done = os.pwrite(self.fd, data, at)
                data, at = data[done:], at + done

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The windows from `start` to `stop`."""
        found = torch.empty((stop - start, self.tokens, self.width), dtype=torch.float32)
        view, at = tensor_bytes(found), start * self.tokens * self.width * 4
        with os_errors("read hidden states", self.path):
            while view:
                done = os.preadv(self.fd, [view], at)
                if not done:
                    raise IrqError(f"{self.path}: hidden states are cut off; remove the folder")
                view, at = view[done:], at + done
        return found

    def flush(self) -> None:
        """See that the states are on the disk."""
        with os_errors("write hidden states", self.path):
            os.fsync(self.fd)

    def close(self) -> None:
        """Nothing is read or written any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def remove(self) -> None:
        """Give the room on the disk back, which a file that is open would keep."""
        self.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def state_file(
    path: Path, windows: int, tokens: int, width: int, *, new: bool
) -> Iterator[StateFile]:
    """Open states, or make room for `new` ones; `IrqError` when the disk refuses."""
    size = windows * tokens * width * 4
    flags = os.O_RDWR | (os.O_CREAT | os.O_TRUNC if new else 0)
    with os_errors("hold hidden states", path, size):
        fd = os.open(path, flags, 0o666)
    file = StateFile(path, fd, windows, tokens, width)
    try:
        with os_errors("hold hidden states", path, size):
            if new and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, max(1, size))
        yield file
    finally:
        file.close()


def chunks(first: int, last: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Windows `first .. last`, of `tokens` tokens each, as many at once as a layer is run on."""
    step = max(1, CHUNK_TOKENS // tokens)
    for start in range(first, last, step):
        yield start, min(last, start + step)
