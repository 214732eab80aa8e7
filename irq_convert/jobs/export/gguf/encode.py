"""Rows of a tensor as the bytes of a GGUF type, and the numbers that those bytes stand for.

Q4_1 holds 32 weights of a row in 20 bytes: d and m in float16, then 16 bytes of codes, whose low
halves are weights 0 to 15 and whose high halves are 16 to 31; w = d * code + m. Our integer
codebooks are w = level * scale + tau with level = -1 + 2 code / (2^bits - 1), hence
d = 2 scale / (2^bits - 1) and m = tau - scale: the codes stay, d and m are rounded once each.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType

from irq_convert.core.codebook import get_codebook
from irq_convert.core.packing import unpack_codes
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.errors import IrqError

BLOCK = 32
"""Weights of a block of Q4_1 and of Q8_0."""
FLOAT_TYPES = {
    GgmlType.F32: torch.float32,
    GgmlType.F16: torch.float16,
    GgmlType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class Encoded:
    """`data`: bytes `[rows, row_nbytes]`; `values`: what they stand for, float64 `[rows, cols]`."""

    data: np.ndarray
    values: np.ndarray


def row_nbytes(kind: GgmlType, cols: int) -> int:
    """Bytes of a row of `cols` numbers; `ValueError` when they do not fill whole blocks."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if cols % block:
        raise ValueError(f"rows of {cols} do not fill blocks of {block}")
    return cols // block * size


def fits_q4_1(codebook: str, block_size: int, cols: int) -> bool:
    """Whether Q4_1 holds the codes unchanged: uniform levels, and blocks made of whole 32s."""
    return get_codebook(codebook).uniform and block_size % BLOCK == 0 and cols % BLOCK == 0


def encode_q4_1(tile: QuantizedTensor, name: str) -> Encoded:
    """`tile` as Q4_1, its codes unchanged; `IrqError` when d or m is beyond float16."""
    bits = get_codebook(tile.codebook).bits
    codes = unpack_codes(tile.codes, bits, tile.cols).numpy()
    scale = expand_statistic(tile.scale, tile.scale_grid).numpy().astype(np.float64)
    tau = expand_statistic(tile.tau, tile.tau_grid).numpy().astype(np.float64)
    # Both exact, or nearly so, in float64: the one rounding is to float16.
    delta = _to_half(_per_block(2 * scale / (2**bits - 1), tile), name)
    least = _to_half(_per_block(tau - scale, tile), name)
    rows, blocks = delta.shape
    halves = codes.reshape(rows, blocks, 2, BLOCK // 2)
    data = np.empty((rows, blocks, 4 + BLOCK // 2), np.uint8)
    data[:, :, 0:2] = delta[:, :, None].view(np.uint8)
    data[:, :, 2:4] = least[:, :, None].view(np.uint8)
    data[:, :, 4:] = halves[:, :, 0] | (halves[:, :, 1] << 4)
    values = codes.reshape(rows, blocks, BLOCK) * delta.astype(np.float64)[:, :, None]
    values += least.astype(np.float64)[:, :, None]
    return Encoded(data.reshape(rows, -1), values.reshape(rows, tile.cols))


def _per_block(statistic: np.ndarray, tile: QuantizedTensor) -> np.ndarray:
    """`[rows, our blocks]` repeated to `[rows, blocks of 32]`; our last one may be short."""
    wide = np.repeat(statistic, tile.block_size // BLOCK, axis=1)
    return wide[:, : tile.cols // BLOCK]


def _to_half(values: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(values.astype("<f2"))
    if not np.isfinite(half).all():
        raise IrqError(
            f"{name}: a block's d or m is {np.abs(values).max():.6g}, beyond float16, in which "
            "Q4_1 stores them: export --to dense"
        )
    return half


def encode_dense(rows: torch.Tensor, kind: GgmlType, name: str) -> Encoded:
    """Floating `rows`, `[rows, cols]`, as `kind`: F32, F16, BF16 or Q8_0, rounded once.

    Raises `IrqError` when a finite number is too large for `kind`.
    """
    if kind == GgmlType.Q8_0:
        return _encode_q8_0(rows, name)
    result = rows.to(FLOAT_TYPES[kind]).contiguous()
    _check_finite(result.isfinite(), rows, kind, name)
    data = result.view(torch.uint8).numpy().reshape(len(rows), -1)
    return Encoded(data, result.to(torch.float64).numpy())


def _encode_q8_0(rows: torch.Tensor, name: str) -> Encoded:
    """Blocks of 32 with a float16 step and signed bytes, as llama.cpp's reference does it."""
    wide = rows.to(torch.float32).contiguous().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        data = gguf.quants.quantize(wide, GgmlType.Q8_0)
    blocks = data.reshape(len(wide), -1, 2 + BLOCK)
    step = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float64)
    whole = torch.from_numpy(np.isfinite(step))
    _check_finite(whole, rows, GgmlType.Q8_0, name)
    values = np.ascontiguousarray(blocks[:, :, 2:]).view(np.int8) * step
    return Encoded(data, values.reshape(wide.shape))


def _check_finite(good: torch.Tensor, rows: torch.Tensor, kind: GgmlType, name: str) -> None:
    if not bool(good.all()):
        if not bool(rows.isfinite().all()):
            raise IrqError(f"{name}: holds NaN or infinite numbers: the model is damaged")
        found = float(rows.to(torch.float64).abs().max())
        raise IrqError(
            f"{name}: holds {found:.6g}, which {kind.name} cannot store: choose bfloat16 or "
            "float32 with --dtype (or --fallback, for a quantized tensor)"
        )
