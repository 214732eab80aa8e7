"""`quantize_tensor`: a dense matrix to packed codes and 8-bit statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from irq_convert.core.backends import resolve_backend
from irq_convert.core.blocks import BlockShape
from irq_convert.core.importance import Shares, column_shares
from irq_convert.core.kernels.quantize import quantize_tile
from irq_convert.core.objective import ZeroPoint
from irq_convert.core.portable.quantize import quantize_portable
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.search_plan import make_tables, plan_search
from irq_convert.core.spec import QuantSpec
from irq_convert.core.tensor_stats import TensorStats
from irq_convert.core.threads import numba_threads
from irq_convert.errors import IrqError, UsageError

TILE_WEIGHTS = 1 << 20


def quantize_tensor(
    weight: torch.Tensor,
    spec: QuantSpec | None = None,
    *,
    importance: torch.Tensor | np.ndarray | None = None,
    backend: str = "auto",
    threads: int | None = None,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize `weight`, `[rows, cols]` in float32, bfloat16, float16 or float64.

    Blocks run along a row. The search follows `spec.objective` over the pairs (tau, scale) that
    the 8-bit statistics can hold, so what is returned is exactly what was optimized. `importance`,
    `[cols]`, weighs squared errors: the mean squares of the inputs of each column. The result
    does not depend on `backend` ("numba" on the CPU, "triton" on an NVIDIA GPU, "torch" anywhere,
    "auto" by device) nor on `threads` (of the CPU; default: numba's). Raises `IrqError` for NaN,
    infinities or magnitudes from 2**120 on, naming `name`; `UsageError` for a shape or dtype that
    cannot be quantized.
    """
    spec = spec or QuantSpec()
    shares = None
    if importance is not None:
        if weight.dim() == 2 and tuple(importance.shape) != tuple(weight.shape[1:]):
            raise UsageError(
                f"{name} {list(weight.shape)}: importance has shape {list(importance.shape)}, not "
                f"[{weight.shape[1]}], a number for each column"
            )
        given = torch.as_tensor(importance).detach().cpu().double().numpy()
        shares = column_shares(given, max(1, len(weight)), spec.block_size, name)
    return quantize_with_stats(
        weight, spec, shares=shares, backend=backend, threads=threads, name=name
    )[0]


def quantize_with_stats(
    weight: torch.Tensor,
    spec: QuantSpec | None = None,
    *,
    shares: Shares | None = None,
    first_row: int = 0,
    backend: str = "auto",
    threads: int | None = None,
    name: str = "weight",
) -> tuple[QuantizedTensor, TensorStats]:
    """`quantize_tensor` with the entropy and error of what is stored.

    `weight` may be a tile of rows, from `first_row` on, of what `shares` are for.
    """
    spec = spec or QuantSpec()
    backend = resolve_backend(backend, weight.device)
    if weight.dim() != 2 or not weight.numel():
        raise UsageError(f"{name} has shape {list(weight.shape)}: only matrices are quantized")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UsageError(f"{name} is {weight.dtype}: only floating-point weights are quantized")
    weight = weight.detach()
    shape = BlockShape(weight.shape[0], weight.shape[1], spec.block_size, spec.bits)
    weighing = None
    if shares is not None:
        weighing = shares.values, shares.owners(first_row, first_row + shape.rows)
    parts = _run(backend, weight, shape, spec, threads, weighing)
    packed, scale, tau, scale_grid, tau_grid, counts, energies = parts
    _refuse_bad(int(counts[:, 2].sum()), weight, name)
    blocks = (shape.rows, shape.blocks_per_row)
    scale, tau = scale.reshape(blocks), tau.reshape(blocks)
    integer = spec.zero_point == ZeroPoint.INTEGER
    result = QuantizedTensor(
        codes=packed,
        scale=scale,
        tau=zero_point_tau(tau, scale, scale_grid, spec) if integer else tau,
        scale_grid=scale_grid,
        tau_grid=None if integer else tau_grid,
        cols=shape.cols,
        codebook=spec.codebook,
        block_size=spec.block_size,
    )
    stats = TensorStats(shape, int(counts[:, 0].sum()), int(counts[:, 1].sum()), energies)
    return result, stats


def _run(
    backend: str,
    weight: torch.Tensor,
    shape: BlockShape,
    spec: QuantSpec,
    threads: int | None,
    weighing: tuple[np.ndarray, np.ndarray] | None,
) -> tuple:
    if backend == "numba":
        return _run_numba(weight.cpu(), shape, spec, threads, weighing)
    if backend == "triton":
        from irq_convert.core.triton.quantize import quantize_triton

        return quantize_triton(weight, shape, spec, weighing)
    by_row = None if weighing is None else torch.from_numpy(weighing[0][weighing[1]])
    return quantize_portable(weight.to(torch.float32).contiguous(), shape, spec, by_row)


def zero_point_tau(
    zero: torch.Tensor, scale: torch.Tensor, scale_grid: torch.Tensor, spec: QuantSpec
) -> torch.Tensor:
    """Tau in float32 of integer zero points: `-(level[zero] * scale)`, the kernel's formula."""
    levels = torch.from_numpy(spec.book.level_array()).to(zero.device)
    return 0.0 - levels[zero.long()] * expand_statistic(scale, scale_grid)


def _run_numba(
    weight: torch.Tensor,
    shape: BlockShape,
    spec: QuantSpec,
    threads: int | None,
    weighing: tuple[np.ndarray, np.ndarray] | None,
) -> tuple:
    packed = torch.empty((shape.rows, shape.row_bytes), dtype=torch.uint8)
    scale = torch.empty(shape.blocks, dtype=torch.uint8)
    tau = torch.empty(shape.blocks, dtype=torch.uint8)
    scale_grid = torch.zeros((shape.groups, 2), dtype=torch.float32)
    tau_grid = torch.zeros((shape.groups, 2), dtype=torch.float32)
    counts = np.zeros((shape.groups, 3), np.int64)
    energies = np.zeros((shape.groups, 2), np.float64)
    weighted = weighing is not None
    plan = plan_search(spec, weighted)
    tables = make_tables(spec.codebook, spec.block_size, weighted)
    shares, owners = weighing or (np.ones((1, shape.cols), np.int32), np.zeros(0, np.int32))
    by_block = [part.numpy() for part in (tau, scale)]
    by_group = [tau_grid.numpy(), scale_grid.numpy(), counts, energies]
    with numba_threads(threads):
        for start, dense in _float32_tiles(weight, shape):
            stop = start + dense.shape[0]
            blocks = slice(shape.tile(start).blocks, shape.tile(stop).blocks)
            groups = slice(shape.tile(start).groups, shape.tile(stop).groups)
            quantize_tile(
                dense,
                shares,
                owners[start:stop],
                spec.block_size,
                plan,
                tables,
                packed.numpy()[start:stop],
                *(part[blocks] for part in by_block),
                *(part[groups] for part in by_group),
            )
    return packed, scale, tau, scale_grid, tau_grid, counts, energies


def _float32_tiles(weight: torch.Tensor, shape: BlockShape) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of `weight` in float32, whole groups at a time.

    One small buffer is used again and again: filling fresh memory would take longer than the
    conversion itself.
    """
    if weight.dtype == torch.float32 and weight.is_contiguous():
        yield 0, weight.numpy()
        return
    step = min(shape.rows, shape.tile_rows(TILE_WEIGHTS))
    buffer = torch.empty((step, shape.cols), dtype=torch.float32)
    for start in range(0, shape.rows, step):
        rows = weight[start : start + step]
        yield start, buffer[: rows.shape[0]].copy_(rows).numpy()


def _refuse_bad(bad: int, weight: torch.Tensor, name: str) -> None:
    if not bad:
        return
    finite = bool(torch.isfinite(weight).all())
    what = "weights of 2^120 or more in magnitude" if finite else "NaN or infinite weights"
    raise IrqError(
        f"{name} {list(weight.shape)} has {what}, which no block can hold: repair the checkpoint "
        "or keep this tensor as it is (--keep)"
    )
