"""Kernels that two processes compile at once: on a fresh clone each would compile all of them.

Half to each, at the beginning; what the other has compiled by then is read from the cache.
"""

from __future__ import annotations

import numpy as np
import torch


def compile_search() -> None:
    """The search, which takes about as long as all others together."""
    from irq_convert.core.quantize import quantize_tensor
    from irq_convert.core.spec import QuantSpec

    quantize_tensor(torch.randn(4, 64), QuantSpec("nf4", 64), threads=1)
    _compile_products(torch.bfloat16)


def compile_others() -> None:
    """The solver, the ideal search, and the way back."""
    from irq_convert.core.dequantize import dequantize_tensor
    from irq_convert.core.ideal.search import icq_search
    from irq_convert.core.kernels.descend import descend_rows
    from irq_convert.core.kernels.sweep import sweep_rows
    from tests.core.oracle import random_sample

    size, single = 16, np.float32
    levels = np.arange(4, dtype=single)
    book = (size, levels, levels[:-1] + single(0.5), 3)
    rows, ones = np.zeros((2, size), single), np.ones((2, 1), single)
    codes, eye = np.zeros((2, size), np.uint8), np.eye(size, dtype=single)
    sweep_rows(rows, ones, ones, eye, np.arange(size), *book, codes)
    grids, zeros = np.ones((2, 1, 6), single), np.full((2, 1), -1, np.int32)
    descend_rows(rows, eye, np.ones(size, single), *book, 1, grids, zeros, ones, ones, codes)
    dequantize_tensor(random_sample(0, 4, 64, "nf4", 64).q)
    icq_search(torch.randn(2, 64), "nf4")
    _compile_products(torch.float32)


def _compile_products(dtype: torch.dtype) -> None:
    from irq_convert.core.decode import packed_product
    from tests.core.oracle import random_sample

    for codebook in ("nf2", "nf3", "nf4"):
        packed_product(torch.ones(1, 64, dtype=dtype), random_sample(0, 4, 64, codebook, 64).q)
