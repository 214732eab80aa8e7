"""How many threads torch and numba compute with, for as long as a job takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Compute on so many threads (None: as before), and leave torch as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def numba_threads(threads: int | None) -> Iterator[None]:
    """At most `threads` of numba's; torch, which may share their library, keeps its own count."""
    import numba

    # Not numba.get_num_threads(): that starts its threads, and with them changes torch's count.
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    of_torch, before = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(min(threads or before, most))
    try:
        yield
    finally:
        numba.set_num_threads(before)
        torch.set_num_threads(of_torch)
