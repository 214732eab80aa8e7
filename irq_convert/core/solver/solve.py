"""`MatrixSolver`: codes, scale and tau of a matrix for the inputs that it sees.

1. Scale and tau by the exact search over storable pairs, squared errors weighed by the diagonal of
   H, from the original weights; they are frozen in their 8 bits.
2. The sweep: codes column by column against H, for the target W*.
3. Rounds of refitting scale and tau on their grids, and of coordinate descent over the codes.

What is stored is what was optimized: nothing is rounded afterwards.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.importance import Shares, column_shares
from irq_convert.core.kernels.descend import descend_rows
from irq_convert.core.kernels.sweep import sweep_rows
from irq_convert.core.objective import ZeroPoint
from irq_convert.core.packing import pack_codes, unpack_codes
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.search_plan import entropy_table
from irq_convert.core.solver.moments import Factor, damped, factorize
from irq_convert.core.solver.options import SolverOptions
from irq_convert.core.spec import QuantSpec
from irq_convert.core.tensor_stats import TensorStats
from irq_convert.core.threads import numba_threads


class MatrixSolver:
    """Quantizes a matrix in tiles of rows, each for the inputs that it sees.

    Rows of one matrix see the same inputs; the experts of a stack, one below the other, do not.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        spec: QuantSpec,
        shares: Shares | None = None,
        *,
        threads: int | None = None,
        name: str = "weight",
    ) -> None:
        """Find scale and tau of `weight`, float32 `[rows, cols]`; `shares` weigh its columns.

        Raises `IrqError` naming the tensor for weights that are not finite.
        """
        self._weight, self._spec, self._threads, self._name = weight, spec, threads, name
        self._found, self._stats = quantize_with_stats(
            weight, spec, shares=shares, threads=threads, name=name
        )
        found = self._found
        self._scale = expand_statistic(found.scale, found.scale_grid).contiguous().numpy()
        self._tau = expand_statistic(found.tau, found.tau_grid).contiguous().numpy()
        self._codes = unpack_codes(found.codes, spec.bits, found.cols).numpy()
        self._levels, self._mids = spec.book.level_array(), spec.book.midpoint_array()
        self._grids, self._zeros = _grids(found), _zero_points(found, spec)

    def solve(
        self,
        start: int,
        target: torch.Tensor,
        moments: torch.Tensor,
        factor: Factor,
        options: SolverOptions,
    ) -> None:
        """Solve the rows from `start` on for `target`, float32 `[rows, cols]`.

        `moments`: H, float32 `[cols, cols]`, symmetric; `factor` is what `factorize` made of it.
        """
        rows = slice(start, start + len(target))
        scale, tau, codes = self._scale[rows], self._tau[rows], self._codes[rows]
        book = (self._spec.block_size, self._levels, self._mids, len(self._mids))
        wanted = target.contiguous().numpy()
        with numba_threads(self._threads):
            if options.sweep:
                order, feedback = factor.order.numpy(), factor.feedback.numpy()
                sweep_rows(wanted, scale, tau, feedback, order, *book, codes)
            if options.rounds:
                against = damped(moments, factor.damping)
                descend_rows(
                    wanted, against.numpy(), (1.0 / against.diagonal()).numpy(), *book,
                    options.rounds, self._grids[rows], self._zeros[rows], scale, tau, codes,
                    np.empty((len(codes), 2), np.float32),
                )  # fmt: skip

    def result(self) -> tuple[QuantizedTensor, TensorStats]:
        """What is stored, with its entropy and its error as a copy of the weights."""
        codes = torch.from_numpy(self._codes)
        stored = _store(self._found, self._spec, self._scale, self._tau, codes)
        stats = _restate(
            self._stats, self._weight, self._codes, self._scale, self._tau, self._levels
        )
        return stored, stats


def solve_matrix(
    weight: torch.Tensor,
    target: torch.Tensor,
    moments: torch.Tensor,
    spec: QuantSpec,
    options: SolverOptions | None = None,
    *,
    threads: int | None = None,
    name: str = "weight",
) -> tuple[QuantizedTensor, TensorStats]:
    """Quantize `target`, float32 `[rows, cols]`, for inputs with second moments `moments`.

    `weight` are the original weights, of which scale and tau are found; statistics speak of them.
    `moments`: H, float32 `[cols, cols]`, symmetric. Raises `IrqError` naming the tensor for
    weights or moments that are not finite.
    """
    options = options or SolverOptions()
    diagonal = moments.diagonal().double().numpy()
    shares = column_shares(diagonal, len(weight), spec.block_size, name)
    solver = MatrixSolver(weight, spec, shares, threads=threads, name=name)
    solver.solve(0, target, moments, factorize(moments, options.damping, name), options)
    return solver.result()


def _grids(found: QuantizedTensor) -> np.ndarray:
    """Step, offset and 1 / step of scale and of tau for each block, `[rows, blocks, 6]`."""
    grid_of_scale, grid_of_tau = found.scale_grid, found.tau_grid
    assert grid_of_scale is not None
    columns = []
    for grid in (grid_of_scale, grid_of_scale if grid_of_tau is None else grid_of_tau):
        step, offset = grid[:, 0], grid[:, 1]
        inverse = torch.where(step > 0, 1.0 / step, torch.zeros_like(step))
        columns += [step, offset, inverse]
    by_group = torch.stack(columns, 1)
    by_block = by_group.repeat_interleave(GROUP_SIZE, 0)[: found.scale.numel()]
    return by_block.view(*found.scale.shape, 6).contiguous().numpy()


def _zero_points(found: QuantizedTensor, spec: QuantSpec) -> np.ndarray:
    """The code whose level ties tau to the scale, for each block; -1 where tau is free."""
    shape = tuple(found.scale.shape)
    if spec.zero_point != ZeroPoint.INTEGER:
        return np.full(shape, -1, np.int32)
    scale = expand_statistic(found.scale, found.scale_grid)
    levels = torch.from_numpy(spec.book.level_array())
    products = 0.0 - levels * scale[..., None]
    hit = products == found.tau[..., None]
    return hit.to(torch.uint8).argmax(-1).to(torch.int32).numpy()


def _store(
    found: QuantizedTensor, spec: QuantSpec, scale: np.ndarray, tau: np.ndarray, codes: torch.Tensor
) -> QuantizedTensor:
    """`found` with other values on the same grids, which hold them exactly."""

    def encoded(values: np.ndarray, grid: torch.Tensor) -> torch.Tensor:
        each = grid.repeat_interleave(GROUP_SIZE, 0)[: values.size]
        step, offset = each[:, 0].double(), each[:, 1].double()
        flat = torch.from_numpy(values).reshape(-1).double()
        safe = torch.where(step > 0, step, torch.ones_like(step))
        code = torch.round(flat / safe - offset)
        return torch.where(step > 0, code, 0.0).to(torch.uint8).view(values.shape)

    assert found.scale_grid is not None
    free = found.tau_grid is not None
    return replace(
        found,
        codes=pack_codes(codes, spec.bits),
        scale=encoded(scale, found.scale_grid),
        tau=encoded(tau, found.tau_grid)
        if found.tau_grid is not None and free
        else (torch.from_numpy(tau)),
    )


def _restate(
    stats: TensorStats,
    weight: torch.Tensor,
    codes: np.ndarray,
    scale: np.ndarray,
    tau: np.ndarray,
    levels: np.ndarray,
) -> TensorStats:
    """`stats` of the search, with entropy and error of what is stored in its place."""
    shape = stats.shape
    padding = shape.blocks_per_row * shape.block_size - shape.cols
    table, total = entropy_table(shape.block_size), 0
    blocks = np.pad(codes, ((0, 0), (0, padding)), constant_values=255)
    blocks = blocks.reshape(shape.blocks, shape.block_size)
    for code in range(len(levels)):
        total += int(table[(blocks == code).sum(1)].sum(dtype=np.int64))
    error = np.empty(shape.blocks, np.float64)
    dense = np.pad(weight.numpy(), ((0, 0), (0, padding))).reshape(blocks.shape)
    step = GROUP_SIZE * 16
    for at in range(0, shape.blocks, step):
        part = slice(at, at + step)
        value = levels[np.minimum(blocks[part], len(levels) - 1)]
        value = value * scale.reshape(-1, 1)[part] + tau.reshape(-1, 1)[part]
        wrong = np.where(blocks[part] == 255, 0.0, value.astype(np.float64) - dense[part])
        error[part] = (wrong * wrong).sum(1)
    energies = stats.energies.copy()
    starts = np.arange(0, shape.blocks, GROUP_SIZE)
    energies[:, 1] = np.add.reduceat(error, starts)
    return TensorStats(shape, stats.plain, total, energies)
