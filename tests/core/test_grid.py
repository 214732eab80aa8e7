"""The 8-bit second level: cover the range, hold zero and anchors, same bits in kernel and torch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from irq_convert.core.kernels.grid import fit_grid as kernel_fit
from irq_convert.core.portable.grid import fit_grid

floats = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)


def fitted(low: float, high: float, anchor: float) -> tuple[np.float32, np.float32]:
    grid = fit_grid(*(torch.tensor([x], dtype=torch.float32) for x in (low, high, anchor)))
    step, offset = kernel_fit(np.float32(low), np.float32(high), np.float32(anchor))
    assert (np.float32(step), np.float32(offset)) == (grid.step.item(), grid.offset.item())
    return np.float32(step), np.float32(offset)


@settings(max_examples=200)
@given(floats, floats)
def test_values_of_the_range_are_within_half_a_step(a: float, b: float) -> None:
    low, high = np.float32(min(a, b)), np.float32(max(a, b))
    step, offset = fitted(low, high, 0.0)
    assert offset == np.floor(offset)
    assert abs(offset) <= 2**20 + 256
    values = step * (np.arange(256, dtype=np.float32) + offset)
    for x in (low, high, (low / 2 + high / 2)):
        assert np.abs(values - x).min() <= step * 0.51 + abs(x) * 1e-6
    if low <= 0 <= high:
        assert 0.0 in values


@settings(max_examples=150)
@given(st.floats(0.03125, 8, width=32), st.floats(0.03125, 8, width=32), st.booleans())
def test_an_anchor_of_a_constant_block_is_on_the_grid(
    span: float, size: float, negative: bool
) -> None:
    anchor = np.float32(-size if negative else size)
    low, high = min(np.float32(-span), anchor), max(np.float32(span), anchor)
    assume(abs(anchor) > (high - low) / 100)
    step, offset = fitted(low, high, anchor)
    assert anchor in step * (np.arange(256, dtype=np.float32) + offset)


def test_degenerate_ranges() -> None:
    assert fitted(0.0, 0.0, 0.0) == (0.0, 0.0)
    for value in (0.3, -0.3, 1e-30):
        step, offset = fitted(value, value, 0.0)
        assert step * (0 + offset) == np.float32(value)
