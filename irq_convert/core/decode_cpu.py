"""The product of a few inputs with packed rows on a CPU: kernels, their tables, and threads.

Threads help and are never waited for: this one takes pieces of the rows from the first on, others
from the last on, and where they meet it computes what they have begun and not finished. So a thread
that does not run, because another process has its core, costs nothing. Which thread computed a row
changes no bit of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from irq_convert.core.codebook import get_codebook
from irq_convert.core.dequantize import thread_pool
from irq_convert.core.quantized import QuantizedTensor

PIECE_WEIGHTS = 1 << 20
"""Weights, times inputs, that are handed to a thread at once."""
SHARED_PIECES = 4
"""Below so many pieces waking a thread costs more than it saves."""


@functools.cache
def usable() -> bool:
    """Whether this machine has the instructions of the kernels."""
    from irq_convert.core.kernels.lookup import machine_has

    return machine_has("avx2", "fma")


@functools.cache
def _tables(codebook: str, words: bool) -> np.ndarray:
    """What the kernels look levels up in: registers of bytes, or of floats."""
    from irq_convert.core.kernels.decode_input import WORD_LEVEL

    book = get_codebook(codebook)
    if not words:
        return np.resize(book.level_array(), 16)
    levels = np.rint(book.level_array().astype(np.float64) * WORD_LEVEL).astype("<i2")
    first = second = np.resize(levels, 16)
    if book.bits == 2:  # a place is that of a pair of codes
        first, second = levels[np.arange(16) % 4], levels[np.arange(16) // 4]
    halves = [
        np.resize(table.view(np.uint8)[part::2], 32) for table in (first, second) for part in (0, 1)
    ]
    return np.concatenate(halves)


def decode_rows(x: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
    """`x @ W^T`, float32 `[tokens, rows]`: `x` `[tokens, cols]` in one of `DTYPES`, on the CPU.

    The parts of `q` fit together.
    """
    from irq_convert.core.kernels import decode as kernels
    from irq_convert.core.kernels import decode_input as inputs

    tokens, cols = x.shape
    rows, words, bits = q.codes.shape[0], x.dtype == torch.bfloat16, get_codebook(q.codebook).bits
    x, parts = (x.float() if x.dtype == torch.float16 else x).contiguous(), _parts(q)
    runs, blocks = -(-cols // inputs.RUN), -(-cols // q.block_size)
    pieces = -(-cols // min(q.block_size, inputs.RUN))
    sizes = (runs * inputs.RUN * (2 if words else 4), -(-pieces // 8) * 32, -(-blocks // 8) * 32)
    made = torch.empty(tokens * sum(sizes), dtype=torch.uint8, device="cpu")
    at = made.data_ptr()
    places = (at, at + tokens * sizes[0], at + tokens * (sizes[0] + sizes[1]))
    prepare = inputs.runs_of_words if words else inputs.runs_of_floats
    prepare(x.data_ptr(), x.itemsize, tokens, cols, q.block_size, bits, *places)
    tables = _tables(q.codebook, words)
    given = (rows, cols, q.block_size, tokens, *(part.data_ptr() for part in parts))
    settings = (*given, parts[1].itemsize, parts[2].itemsize, *places, tables.ctypes.data)
    y = torch.empty(tokens, rows, dtype=torch.float32, device="cpu")
    kernel = kernels.MULTIPLY[words, bits]

    def multiply(begin: int, end: int, out: torch.Tensor) -> None:
        kernel(begin, end, *settings, out.data_ptr())

    threads = min(torch.get_num_threads(), rows)
    many = rows * cols * tokens // PIECE_WEIGHTS
    if threads < 2 or many < SHARED_PIECES:
        multiply(0, rows, y)
    else:
        share(multiply, y, many, threads, (made, *parts))
    return y


def _parts(q: QuantizedTensor) -> list[torch.Tensor]:
    """Codes, statistics and grids as the kernels read them."""
    none = q.codes
    found = [q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid]
    parts = [none if part is None else part for part in found]
    for i in (1, 2):
        if parts[i].dtype == torch.float16:
            parts[i] = parts[i].float()
    return [part if part.is_contiguous() else part.contiguous() for part in parts]


@dataclass
class _Meeting:
    """How far this thread is, for the others to see; pieces from here on are theirs to take."""

    front: int = 0


def share(
    multiply: Callable[[int, int, torch.Tensor], None],
    y: torch.Tensor,
    many: int,
    threads: int,
    kept: tuple[torch.Tensor, ...],
) -> None:
    """Fill `y` in `many` pieces of its rows together with other threads; waits for none of them.

    They write to a tensor of their own and keep `kept` from being freed. In a process group they
    are waited for: what shards parameters frees their memory while tensors still hold it.
    """
    rows = y.shape[1]
    edges = [rows * i // many for i in range(many + 1)]
    other, done, meeting = torch.empty_like(y), [False] * many, _Meeting()
    alive = [part.detach() for part in kept]
    turns = iter(range(many - 1, -1, -1))

    def help_out(turns: Iterator[int]) -> None:
        for i in turns:
            if i <= meeting.front or not alive:
                return
            multiply(edges[i], edges[i + 1], other)
            done[i] = True

    helpers = min(threads - 1, many // 2)
    pool = thread_pool(os.getpid(), threads - 1)
    jobs = [pool.submit(help_out, turns) for _ in range(helpers)]
    for i in range(many):
        meeting.front = i
        begin, end = edges[i], edges[i + 1]
        if done[i]:
            y[:, begin:end] = other[:, begin:end]
        else:
            multiply(begin, end, y)
    meeting.front = many
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for job in jobs:
            job.result()
