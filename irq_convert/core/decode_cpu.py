"""The product of a few inputs with packed rows on a CPU: kernels, their tables, and threads.

Threads help and are never waited for: this one takes pieces of the rows from the first on, others
from the last on, and where they meet it computes what they have begun and not finished. So a thread
that does not run, because another process has its core, costs nothing. Which thread computed a row
changes no bit of it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
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


class _Plan:
    """What the products with matrices of one layout have in common, but for the tokens."""

    def __init__(self, cols: int, codebook: str, block_size: int, words: bool) -> None:
        from irq_convert.core.kernels import decode, decode_input

        self.bits, run = get_codebook(codebook).bits, decode_input.RUN
        self.prepare = decode_input.runs_of_words if words else decode_input.runs_of_floats
        self.multiply = decode.MULTIPLY[words, self.bits]
        self.tables = _tables(codebook, words).ctypes.data
        pieces, blocks = -(-cols // min(block_size, run)), -(-cols // block_size)
        self.inputs = -(-cols // run) * run * (2 if words else 4)
        self.units, self.sums = -(-pieces // 8) * 32, -(-blocks // 8) * 32
        self.scratch = self.inputs + self.units + self.sums
        """Bytes of a prepared token: its numbers, units and sums."""


_plan = functools.lru_cache(1024)(_Plan)


def decode_rows(
    x: torch.Tensor, q: QuantizedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ W^T + bias`, `[..., rows]` in the dtype of `x`, which is bfloat16 or float32.

    `x` `[..., cols]` and `bias` `[rows]` are on the CPU, and the parts of `q` fit together.
    """
    cols, block_size, words = q.cols, q.block_size, x.dtype is torch.bfloat16
    plan = _plan(cols, q.codebook, block_size, words)
    x = x if x.is_contiguous() else x.contiguous()
    tokens = x.numel() // cols
    scratch = x.new_empty(tokens * plan.scratch // 2)
    inputs = scratch.data_ptr()
    units = inputs + tokens * plan.inputs
    sums = units + tokens * plan.units
    size = 2 if words else 4
    plan.prepare(x.data_ptr(), size, tokens, cols, block_size, plan.bits, inputs, units, sums)
    held, places = _places(q)
    if bias is not None:
        bias = bias if bias.is_contiguous() else bias.contiguous()
    rows = held[0].shape[0]
    settings = (
        rows, cols, block_size, tokens, *places, inputs, units, sums, plan.tables,
        0 if bias is None else bias.data_ptr(),
    )  # fmt: skip
    y = x.new_empty(*x.shape[:-1], rows)
    weights = rows * cols * tokens
    if weights < SHARED_PIECES * PIECE_WEIGHTS or torch.get_num_threads() < 2:
        plan.multiply(0, rows, *settings, y.data_ptr())
        return y

    def multiply(begin: int, end: int, out: torch.Tensor) -> None:
        plan.multiply(begin, end, *settings, out.data_ptr())

    many, threads = min(rows, weights // PIECE_WEIGHTS), torch.get_num_threads()
    share(multiply, y.view(tokens, rows), many, threads, (scratch, *held, bias))
    return y


def _places(q: QuantizedTensor) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """The parts of `q` as kernels read them, where they lie, and the bytes of a statistic."""
    none = q.codes
    held = [none if part is None else part for part in _parts(q)]
    for i in (1, 2):
        if held[i].dtype is torch.float16:
            held[i] = held[i].float()
    held = [part if part.is_contiguous() else part.contiguous() for part in held]
    return held, (*(part.data_ptr() for part in held), held[1].itemsize, held[2].itemsize)


def _parts(q: QuantizedTensor) -> tuple[torch.Tensor | None, ...]:
    return q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid


@dataclass
class _Meeting:
    """How far this thread is, for the others to see; pieces from here on are theirs to take."""

    front: int = 0


def share(
    multiply: Callable[[int, int, torch.Tensor], None],
    y: torch.Tensor,
    many: int,
    threads: int,
    kept: Sequence[torch.Tensor | None],
) -> None:
    """Fill `y` in `many` pieces of its rows together with other threads; waits for none of them.

    They write to a tensor of their own and keep `kept` from being freed. In a process group they
    are waited for: what shards parameters frees their memory while tensors still hold it.
    """
    rows = y.shape[1]
    edges = [rows * i // many for i in range(many + 1)]
    other, done, meeting = torch.empty_like(y), [False] * many, _Meeting()
    alive = [
        part.detach() for part in kept if part is not None
    ]  # a parameter may be given other memory
    turns = iter(range(many - 1, -1, -1))

    def help_out(turns: Iterator[int], alive: list[torch.Tensor]) -> None:
        for i in turns:
            if i <= meeting.front:
                return
            multiply(edges[i], edges[i + 1], other)
            done[i] = True

    helpers = min(threads - 1, many // 2)
    pool = thread_pool(os.getpid(), threads - 1)
    jobs = [pool.submit(help_out, turns, alive) for _ in range(helpers)]
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
