"""The check of a finished merge layer by layer: its files against base plus adapter, on a probe.

Each adapted layer is read back from what was written and multiplied with one fixed random input;
so are its base and its adapter, the latter unfolded, as in training. Where the result may differ
by rounding alone, what that can do to an output follows from the dtype, and is the most allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from irq_convert.artifact.adapter import LayerValues, StoredAdapter, read_layer
from irq_convert.artifact.contents import examine_artifact, read_quantized
from irq_convert.artifact.structure import StoredTensor
from irq_convert.artifact.values import source_tiles, tiles
from irq_convert.checkpoint.buffers import dtype_name
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.codebook import get_codebook
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.elastic import block_sums, block_weights, elastic
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.errors import IrqError
from irq_convert.jobs.merge.moves import TensorMoves
from irq_convert.jobs.merge.options import MergeTo
from irq_convert.jobs.merge.plan import MergedTensor, MergePlan
from irq_convert.progress import Progress

TILE_WEIGHTS = 1 << 20
# The most that rounding to nearest changes: relative to a number, and near zero.
ROUNDING = {"F64": 2.0**-53, "F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
SMALLEST = {"F64": 0.0, "F32": 2.0**-150, "BF16": 2.0**-134, "F16": 2.0**-25}
SIGMAS = 6.0
"""Standard deviations that a sum of worst roundings may be off; they are smaller on the whole."""
NOISE = 2.0**-40
"""Of float64 sums, as a part of what they could be at most."""


@dataclass(frozen=True)
class LayerCheck:
    """One layer on the probe.

    `difference` is the largest, relative to the largest output. `bound` is the largest quotient of
    a difference and its bound, at most 1; None for a layer that was quantized again.
    """

    tensor: str
    difference: float
    bound: float | None


def check_layers(
    plan: MergePlan, adapter: StoredAdapter, folder: Path, progress: Progress
) -> list[LayerCheck]:
    """Check every adapted layer in `folder`, the result of `plan` (dense or irq).

    Raises `IrqError` naming the first tensor of which an output is farther from base plus adapter
    than the rounding of its dtype explains.
    """
    adapted = [tensor for tensor in plan.tensors if tensor.changed]
    found = _stored(plan, folder)
    progress.phase("checking layers", len(adapted), sum(tensor.nbytes for tensor in adapted))
    checks = []
    with TileReader() as reader:
        for tensor in adapted:
            check = _check(reader, tensor, found[tensor.name], adapter)
            progress.advance(tensor.nbytes, finished=True)
            if check.bound is not None and not check.bound <= 1:
                raise IrqError(
                    f"{tensor.name}: what was written differs from base plus adapter by "
                    f"{check.difference:.3g} of the output, {check.bound:.3g} times what rounding "
                    "explains: the result was not kept; a disk or memory may be failing"
                )
            checks.append(check)
    return checks


def _stored(plan: MergePlan, folder: Path) -> dict[str, StoredTensor | TensorInfo]:
    """The tensors of the result, read from its headers again."""
    if plan.options.to == MergeTo.DENSE:
        return dict(open_checkpoint(folder).tensors)
    artifact, problems = examine_artifact(folder, None)
    if problems:
        raise IrqError(f"the merged artifact is not sound and was not kept: {problems[0]}")
    quantized = {tensor.name: tensor for tensor in artifact.quantized}
    return {**quantized, **{info.name: info for info in artifact.copied}}


def probe_input(name: str, cols: int) -> torch.Tensor:
    """The fixed random input of a layer, float64 `[cols]`; it depends on the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(cols, generator=generator, dtype=torch.float64)


def unfolded_output(
    values: LayerValues, scaling: float, x: torch.Tensor, block_size: int | None
) -> torch.Tensor:
    """`s (B x' + beta2 E x')` with `x' = A u + beta1 P u'`, float64 `[out]`, as training has it.

    `u` is `x` or its block sums, `u'` the same as means (docs/method.md).
    """
    u = x if block_size is None else block_sums(x, block_size)
    mean = u if block_size is None else u * block_weights(x.shape[0], block_size)
    rank, out = values.a.shape[0], values.b.shape[0]
    inner = values.a @ u + values.beta[0] * elastic(mean, rank)
    return scaling * (values.b @ inner + values.beta[1] * elastic(inner, out))


def _check(
    reader: TileReader,
    tensor: MergedTensor,
    merged: StoredTensor | TensorInfo,
    adapter: StoredAdapter,
) -> LayerCheck:
    x, change = _change(reader, tensor, adapter)
    moves = None
    if tensor.statistics is not None:
        moves = TensorMoves.read(reader, tensor.name, tensor.statistics)
    exact, size = _Sums(change.abs()), float(x.norm())
    for start, stop, after, stored in _merged_tiles(reader, tensor, merged):
        rows = slice(start, stop)
        before, packed = _tile(reader, tensor.base, start, stop)
        if moves is not None and packed is not None:
            before += moves.change(packed, start)
        wanted = before @ x + change[rows]
        slack = _rounding(before, after, stored, tensor)
        noise = NOISE * ((_norm(before) + _norm(after)) * size + change[rows].abs())
        exact.add((after @ x - wanted).abs(), wanted.abs(), slack + noise)
    bound = exact.worst if tensor.again is None else None
    return LayerCheck(tensor.name, exact.difference / (exact.largest or 1.0), bound)


def _change(
    reader: TileReader, tensor: MergedTensor, adapter: StoredAdapter
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probe `[cols]` and what the adapter's matrices make of it, `[rows]`."""
    adapted = tensor.adapted
    if adapted is None:
        assert isinstance(tensor.base, StoredTensor)
        x = probe_input(tensor.name, tensor.base.shape.cols)
        return x, x.new_zeros(tensor.base.shape.rows)
    x = probe_input(tensor.name, adapted.cols)
    values = read_layer(reader, adapter.config, adapted.layer)
    return x, unfolded_output(values, adapted.layer.scaling, x, adapted.block_size)


class _Sums:
    """Largest difference, output and quotient of difference and bound over the tiles of a layer."""

    def __init__(self, change: torch.Tensor) -> None:
        self.difference = self.worst = 0.0
        self.largest = float(change.max())

    def add(self, difference: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor) -> None:
        quotient = torch.where(difference == 0, 0.0, difference / bound)
        # `nan > x` is False, and a NaN must not pass.
        self.worst = (
            float("inf") if bool(quotient.isnan().any()) else max(self.worst, float(quotient.max()))
        )
        self.difference = max(self.difference, float(difference.max()))
        self.largest = max(self.largest, float(wanted.max()))


def _merged_tiles(
    reader: TileReader, tensor: MergedTensor, merged: StoredTensor | TensorInfo
) -> Iterator[tuple[int, int, torch.Tensor, QuantizedTensor | None]]:
    """Rows `start .. stop` of what was written, in float64 and as stored."""
    if isinstance(merged, TensorInfo) and isinstance(tensor.base, StoredTensor):
        for start, data in source_tiles(reader, tensor.base, merged):
            yield start, start + data.shape[0], data.double(), None
        return
    for start, stop in _row_tiles(tensor, merged):
        yield start, stop, *_tile(reader, merged, start, stop)


def _row_tiles(
    tensor: MergedTensor, merged: StoredTensor | TensorInfo
) -> Iterable[tuple[int, int]]:
    """Tiles that both the base and the result can be read in."""
    if isinstance(merged, StoredTensor):
        return tiles(merged.shape)
    return _plain_tiles(*tensor.shape)


def _plain_tiles(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, TILE_WEIGHTS // max(1, cols))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _tile(
    reader: TileReader, tensor: StoredTensor | TensorInfo, start: int, stop: int
) -> tuple[torch.Tensor, QuantizedTensor | None]:
    """Rows of a stored tensor in float64, and the parts they came from."""
    if isinstance(tensor, StoredTensor):
        stored = read_quantized(reader, tensor, start, stop)
        return dequantize_tensor(stored).double(), stored
    return reader.read_rows(tensor, start, stop).double(), None


def _rounding(
    before: torch.Tensor, after: torch.Tensor, stored: QuantizedTensor | None, tensor: MergedTensor
) -> torch.Tensor:
    """How far each output may be off by rounding alone, `[rows]`; from norms of rows.

    Roundings `e_i` of a row's weights make its output wrong by `sum e_i x_i`, which over normal
    inputs is normal with variance `sum e_i^2`; a tau's rounding counts for its whole block, and a
    scale's as often as the largest level says.
    """
    cols = after.shape[1]
    if stored is None:
        assert isinstance(tensor.target, str)
        return SIGMAS * (
            ROUNDING[tensor.target] * _norm(after) + SMALLEST[tensor.target] * cols**0.5
        )
    tau, wide = _half_steps(stored.tau, stored.tau_grid)
    if tensor.moves_scale:
        largest = max(abs(level) for level in get_codebook(stored.codebook).levels)
        wide = wide + largest * _half_steps(stored.scale, stored.scale_grid)[1]
    lengths = 1 / block_weights(cols, stored.block_size)
    # Product and sum of every weight were rounded to float32, before and after.
    single = _norm(before) + _norm(after) + (tau.square() @ lengths).sqrt()
    return SIGMAS * ((wide.square() @ lengths).sqrt() + 2 * ROUNDING["F32"] * single)


def _half_steps(
    stored: torch.Tensor, grid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes of a statistic, and how far each may be from what was to be stored."""
    values = expand_statistic(stored, grid).double().abs()
    if grid is not None:
        steps = grid * torch.tensor([1, 0])
        return values, expand_statistic(torch.ones_like(stored), steps).double() / 2
    kind = dtype_name(stored.dtype)
    return values, values * ROUNDING[kind] + SMALLEST[kind]


def _norm(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=1)
