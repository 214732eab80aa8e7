"""The product of a few inputs with packed rows on a CPU: kernels, their tables, and threads.

Threads help and are never waited for: this one takes rows from the first on, another from the last
on, and where they meet it computes what the other has begun and not finished. So a thread that does
not run, because another process has its core, costs nothing. They see each other inside the
kernels, without Python's lock. Where no core is free even that is slower than one thread, so both
are tried and the faster is kept (`Pace`). Which thread computed a row changes no bit of it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from irq_convert.core.codebook import get_codebook
from irq_convert.core.dequantize import thread_pool
from irq_convert.core.quantized import QuantizedTensor

SHARED_WEIGHTS = 1 << 23
"""Below so many weights, times inputs, waking a thread costs more than it saves."""
TRY_AGAIN = 64
"""Products after which the slower of one thread and several is tried again."""
WORTH = 0.8
"""What part of the time of one thread several may take to be kept; half, where cores are free."""
MOST_THREADS = 16
"""Of one product: more would rather wait for memory."""


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
    threads, weights = torch.get_num_threads(), rows * cols * tokens
    if threads < 2 or weights < SHARED_WEIGHTS:
        plan.multiply(0, rows, *settings, y.data_ptr(), 0, True)
        return y
    shared, begin = PACE.shares(), time.perf_counter_ns()
    multiply = functools.partial(_multiply, plan, settings)
    if shared:
        _share(multiply, y.view(tokens, rows), min(threads, MOST_THREADS), (scratch, *held, bias))
    else:
        multiply(0, rows, y, 0, True)
    PACE.saw(shared, (time.perf_counter_ns() - begin) / weights)
    return y


@dataclass
class Pace:
    """Whether sharing pays now: nanoseconds a weight, shared and alone, the last ones most.

    On cores that are busy with something else a second thread takes time from the first one.
    """

    times: dict[bool, float] = field(default_factory=dict)
    turn: int = 0

    def shares(self) -> bool:
        """What was faster; every `TRY_AGAIN` products the other, for the machine changes."""
        for way in (True, False):
            if way not in self.times:
                return way
        self.turn += 1
        faster = self.faster()
        return faster if self.turn % TRY_AGAIN else not faster

    def faster(self) -> bool:
        """Whether several threads are, by so much that it counts."""
        return self.times[True] < WORTH * self.times[False]

    def saw(self, shared: bool, pace: float) -> None:
        """Count what a product took: more where there are few to count."""
        before = self.times.get(shared, pace)
        rare = len(self.times) == 2 and shared != self.faster()
        self.times[shared] = before + (pace - before) / (2 if rare else 8)


PACE = Pace()


def _multiply(
    plan: _Plan, settings: tuple[Any, ...], begin: int, end: int, out: torch.Tensor, *how: Any
) -> int:
    row: int = plan.multiply(begin, end, *settings, out.data_ptr(), *how)
    return row


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


def _share(
    multiply: Callable[..., int],
    y: torch.Tensor,
    threads: int,
    kept: Sequence[torch.Tensor | None],
) -> None:
    """Fill `y` `[tokens, rows]` together with other threads; waits for none of them.

    Each of them has a part of the rows, which it goes through from the last on; this thread goes
    through all parts from the first row on, each until it meets the other. Others write to a tensor
    of their own and keep `kept` from being freed. In a process group they are waited for: what
    shards parameters frees their memory while tensors still hold it.
    """
    rows, parts = y.shape[1], threads - 1
    edges = [rows * i // parts for i in range(parts + 1)]
    meetings = np.array([edges[:-1], edges[1:]], np.int64).T.copy()
    other, at = torch.empty_like(y), meetings.ctypes.data
    # Not the parameters themselves, which may be given other memory.
    alive = [part.detach() for part in kept if part is not None]

    def help_out(part: int, kept: Any) -> None:
        multiply(edges[part], edges[part + 1], other, at + 16 * part, False)

    pool = thread_pool(os.getpid(), threads - 1)
    jobs = [pool.submit(help_out, part, (alive, meetings)) for part in range(parts)]
    for part, end in enumerate(edges[1:]):
        row = multiply(edges[part], end, y, at + 16 * part, True)
        y[:, row:end] = other[:, row:end]
        meetings[part, 0] = end
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for job in jobs:
            job.result()
