"""The format read literally in numpy: random quantized matrices with their dense values.

Nothing here shares code with `irq_convert` but the names of the codebooks and the dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from irq_convert.core.codebook import get_codebook
from irq_convert.core.quantized import QuantizedTensor


@dataclass(frozen=True)
class Sample:
    """A quantized matrix, the codes in it and the float32 weights that it must decode to."""

    q: QuantizedTensor
    codes: np.ndarray
    dense: np.ndarray


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack row by row through single bits: bit j of code c is bit `c * bits + j` of the row."""
    stream = (codes[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")


def random_sample(
    seed: int,
    rows: int,
    cols: int,
    codebook: str = "nf4",
    block_size: int = 64,
    scale_dtype: str = "uint8",
    tau_dtype: str = "uint8",
    magnitude: float = 0.05,
) -> Sample:
    """Random codes and statistics of every kind, with their dense values by the formula."""
    rng = np.random.default_rng(seed)
    bits = get_codebook(codebook).bits
    codes = rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    blocks = -(-cols // block_size)
    scale, scale_grid, scales = _statistic(rng, rows, blocks, scale_dtype, 0.0, magnitude)
    tau, tau_grid, taus = _statistic(rng, rows, blocks, tau_dtype, -magnitude / 4, magnitude / 4)
    level = np.array(get_codebook(codebook).levels, np.float32)[codes]
    block_of = np.arange(cols) // block_size
    dense = (level * scales[:, block_of]).astype(np.float32) + taus[:, block_of]
    assert dense.dtype == np.float32
    packed = torch.from_numpy(pack_bits(codes, bits))
    q = QuantizedTensor(packed, scale, tau, scale_grid, tau_grid, cols, codebook, block_size)
    return Sample(q, codes, dense)


def _statistic(
    rng: np.random.Generator, rows: int, blocks: int, dtype: str, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor | None, np.ndarray]:
    if dtype != "uint8":
        stored = rng.uniform(low, high, (rows, blocks)).astype(dtype)
        return torch.from_numpy(stored), None, stored.astype(np.float32)
    codes = rng.integers(0, 256, (rows, blocks)).astype(np.uint8)
    groups = -(-rows * blocks // 256)
    step = rng.uniform((high - low) / 500, (high - low) / 250, groups).astype(np.float32)
    offset = np.floor(low / step + rng.integers(0, 3, groups)).astype(np.float32)
    group = np.arange(rows * blocks) // 256
    values = step[group] * (codes.reshape(-1).astype(np.float32) + offset[group])
    grid = torch.from_numpy(np.stack([step, offset], axis=1))
    return torch.from_numpy(codes), grid, values.reshape(rows, blocks)


def round_to_bfloat16(value: float) -> float:
    """The nearest bfloat16 of a normal number by exact fractions, ties to even."""
    exact = Fraction(value)
    if exact == 0:
        return 0.0
    exponent = np.frexp(value)[1] - 8
    unit = Fraction(2) ** int(exponent)
    return float(round(exact / unit) * unit)
