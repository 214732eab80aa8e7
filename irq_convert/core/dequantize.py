"""From a quantized matrix back to dense weights: one function over three exact implementations.

On the CPU compiled kernels split the rows over threads, on an NVIDIA GPU a Triton kernel makes one
pass, and anywhere else torch operations do the same arithmetic. All give the binary32 values of
formats/irq-v1.md, section 4, bit for bit; another dtype is converted from those, once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from irq_convert.core.backends import resolve_backend
from irq_convert.core.codebook import MOST_LEVELS, get_codebook
from irq_convert.core.packing import unpack_codes
from irq_convert.core.scales import check_statistic, expand_statistic
from irq_convert.errors import UsageError

if TYPE_CHECKING:
    from irq_convert.core.quantized import QuantizedTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SERIAL_WEIGHTS = 1 << 20
"""Below this many weights handing rows to threads costs more than it saves."""
TILE_WEIGHTS = 1 << 20
"""Weights that pass through a float32 tile where a dtype needs one."""


def dequantize_tensor(
    q: QuantizedTensor,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "auto",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense matrix `[rows, cols]` of `q` in `dtype`, on the device of `q`.

    `backend`: "numba" (CPU only), "triton" (NVIDIA GPUs), "torch" (any device) or "auto". `out`,
    contiguous and of the right shape, dtype and device, is written instead of a new tensor.
    Raises `UsageError` for an unsupported dtype, backend or `out`, `IrqError` when the parts of `q`
    do not fit together.
    """
    return dequantize_rows(q, 0, q.codes.shape[0], dtype, backend=backend, out=out)


def dequantize_rows(
    q: QuantizedTensor,
    begin: int,
    end: int,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "auto",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows `begin .. end` of `dequantize_tensor(q, dtype)`, `[end - begin, cols]`."""
    if dtype not in DTYPES:
        raise UsageError(
            f"cannot dequantize to {dtype}: choose one of {', '.join(map(str, DTYPES))}"
        )
    backend = resolve_backend(backend, q.codes.device)
    if backend == "numba" and q.codes.device.type != "cpu":
        raise UsageError(f"the numba backend needs tensors on the CPU, not on {q.codes.device}")
    if not 0 <= begin <= end <= q.codes.shape[0]:
        raise UsageError(f"rows {begin} to {end} are not rows of a matrix of {q.codes.shape[0]}")
    q.check()
    shape = (end - begin, q.cols)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=q.codes.device)
    _check_out(out, shape, dtype, q.codes.device)
    with torch.no_grad():
        if backend == "numba":
            _numba(q, begin, end, out)
        elif backend == "triton":
            from irq_convert.core.triton.dequantize import dequantize_triton

            dequantize_triton(q, begin, end, out)
        else:
            _torch(q, begin, end, out)
    return out


def _check_out(
    out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    same = tuple(out.shape) == shape and out.dtype == dtype and out.device == device
    if not same or not out.is_contiguous():
        raise UsageError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}: it must be contiguous "
            f"{dtype} {list(shape)} on {device}"
        )


def _tiles(q: QuantizedTensor, begin: int, end: int) -> list[tuple[int, int]]:
    step = max(1, TILE_WEIGHTS // max(1, q.cols))
    return [(row, min(row + step, end)) for row in range(begin, end, step)]


def _torch(q: QuantizedTensor, begin: int, end: int, out: torch.Tensor) -> None:
    """The portable implementation, a tile of rows at a time so that indices stay small."""
    book = get_codebook(q.codebook)
    levels = torch.tensor(book.levels, dtype=torch.float32, device=q.codes.device)
    scale = expand_statistic(q.scale, q.scale_grid)
    tau = expand_statistic(q.tau, q.tau_grid)
    padding = scale.shape[1] * q.block_size - q.cols
    for low, high in _tiles(q, begin, end):
        codes = functional.pad(unpack_codes(q.codes[low:high], book.bits, q.cols), (0, padding))
        values = levels.index_select(0, codes.reshape(-1).to(torch.int32))
        values = values.view(high - low, -1, q.block_size)
        # Two operations, so two roundings.
        values.mul_(scale[low:high, :, None]).add_(tau[low:high, :, None])
        out[low - begin : high - begin] = values.view(high - low, -1)[:, : q.cols]


def _numba(q: QuantizedTensor, begin: int, end: int, out: torch.Tensor) -> None:
    """The compiled kernels; float16 and float64 go through a float32 tile."""
    from irq_convert.core.kernels import dequantize as kernels

    args = _kernel_arguments(q)
    if out.dtype == torch.float32:
        _split(kernels.dequantize_rows, begin, end, args, out.numpy().view(np.uint32))
    elif out.dtype == torch.bfloat16:
        _split(kernels.dequantize_rows, begin, end, args, out.view(torch.uint16).numpy())
    else:
        tiles = _tiles(q, begin, end)
        rows = max((high - low for low, high in tiles), default=0)
        buffer = torch.empty(rows, q.cols, dtype=torch.float32, device="cpu")
        for low, high in tiles:
            _split(kernels.dequantize_rows, low, high, args, buffer.numpy().view(np.uint32))
            out[low - begin : high - begin] = buffer[: high - low]


def _kernel_arguments(q: QuantizedTensor) -> tuple[Any, ...]:
    book = get_codebook(q.codebook)
    parts = [_as_array(q.codes)]
    for stored, grid in ((q.scale, q.scale_grid), (q.tau, q.tau_grid)):
        check_statistic(stored, grid)
        wide = stored if stored.dtype == torch.uint8 else stored.to(torch.float32)
        parts.append(_as_array(wide))
    for grid in (q.scale_grid, q.tau_grid):
        known = torch.empty(0, 2, dtype=torch.float32, device="cpu") if grid is None else grid
        parts.append(_as_array(known))
    return (*parts, _levels(q.codebook), book.bits, q.block_size)


def _as_array(part: torch.Tensor) -> np.ndarray:
    """`part` as an array on the same memory.

    Not through `Tensor.numpy()`: that marks the storage as never to be resized, and resizing is
    how FSDP2 frees a gathered parameter.
    """
    return np.from_dlpack(part.detach().contiguous())


@functools.cache
def _levels(codebook: str) -> np.ndarray:
    """The levels repeated to as many as kernels look up in."""
    return np.resize(get_codebook(codebook).level_array(), MOST_LEVELS)


@functools.cache
def thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Workers of this process; threads do not survive a fork, so the key names the process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="irq")


def _split(
    kernel: Callable[..., None], begin: int, end: int, args: tuple[Any, ...], out: Any
) -> None:
    """Run `kernel` over the rows on `torch.get_num_threads()` threads, this one included."""
    rows = end - begin
    threads = min(torch.get_num_threads(), rows)
    if threads < 2 or rows * out.shape[1] < SERIAL_WEIGHTS:
        kernel(begin, end, begin, *args, out)
        return
    edges = [begin + rows * i // threads for i in range(threads + 1)]
    pool = thread_pool(os.getpid(), threads - 1)
    jobs = [pool.submit(kernel, low, high, begin, *args, out) for low, high in pairwise(edges[1:])]
    kernel(begin, edges[1], begin, *args, out)
    for job in jobs:
        job.result()
