"""The sorting network, for every block size."""

from __future__ import annotations

import numpy as np
import pytest

from irq_convert.core.kernels.sort import LANES, merge_network, sort_lanes
from irq_convert.core.spec import BLOCK_SIZES


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_the_network_sorts_every_sequence_of_zeros_and_ones(size: int) -> None:
    """By the zero-one principle it then sorts everything."""
    keys = ((np.arange(2**size)[:, None] >> np.arange(size)) & 1).astype(np.int8)
    for i, j in merge_network(size):
        low, high = np.minimum(keys[:, i], keys[:, j]), np.maximum(keys[:, i], keys[:, j])
        keys[:, i], keys[:, j] = low, high
    assert (np.diff(keys, axis=1) >= 0).all()


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_lanes_are_sorted(size: int) -> None:
    keys = np.random.default_rng(size).standard_normal((size, LANES)).astype(np.float32)
    keys[size // 2 :, 3] = np.inf
    keys[:, 5] = 0.0
    flat = keys.flatten()
    sort_lanes(flat, merge_network(size))
    assert (flat.reshape(size, LANES) == np.sort(keys, axis=0)).all()
