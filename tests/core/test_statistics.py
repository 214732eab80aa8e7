"""Encoding statistics and expanding them again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.blocks import GROUP_SIZE
from irq_convert.core.scales import encode_statistic, expand_statistic
from irq_convert.errors import IrqError

shapes = st.tuples(st.integers(1, 60), st.integers(1, 20))


def values_of(shape: tuple[int, int], scale: float, shift: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift


@settings(max_examples=150)
@given(
    shapes,
    st.sampled_from([1e-6, 0.01, 1.0, 300.0]),
    st.sampled_from([0.0, 0.5, -7.0, 400.0]),
    st.integers(0, 999),
)
def test_eight_bits_are_within_half_a_step(
    shape: tuple[int, int], scale: float, shift: float, seed: int
) -> None:
    values = values_of(shape, scale, shift, seed)
    codes, grid = encode_statistic(values, torch.uint8)
    assert grid is not None
    assert codes.dtype == torch.uint8
    assert codes.shape == values.shape
    assert grid.dtype == torch.float32
    assert grid.shape == (-(-values.numel() // GROUP_SIZE), 2)
    step, offset = grid[:, 0], grid[:, 1]
    assert bool((step >= 0).all())
    assert torch.equal(offset, offset.round())  # formats/irq-v1.md, section 6
    assert bool((offset.abs() + 255 < 2**21).all())
    off = (expand_statistic(codes, grid).double() - values).abs().reshape(-1)
    steps = step.double().repeat_interleave(GROUP_SIZE)[: off.numel()]
    # The grid is in float32, and so is the value that is encoded.
    assert bool((off <= steps * (0.5 + 1e-3) + values.reshape(-1).abs() * 2e-7).all())


@settings(max_examples=60)
@given(shapes, st.integers(0, 999), st.sampled_from([torch.float32, torch.float16]))
def test_floats_are_rounded_once(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    values = values_of(shape, 1.0, 0.1, seed)
    stored, grid = encode_statistic(values, dtype)
    assert grid is None
    assert stored.dtype == dtype
    assert torch.equal(expand_statistic(stored, grid), values.to(dtype).float())
    again, _ = encode_statistic(expand_statistic(stored, grid), dtype)
    assert torch.equal(again, stored)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.5])
def test_a_group_of_one_value_is_exact(value: float) -> None:
    values = torch.full((3, 100), value, dtype=torch.float32)
    codes, grid = encode_statistic(values, torch.uint8)
    assert torch.equal(expand_statistic(codes, grid), values)


def test_groups_do_not_share_their_range() -> None:
    values = torch.cat([torch.linspace(0, 1, 256), torch.linspace(0, 1000, 256)])[None]
    codes, grid = encode_statistic(values, torch.uint8)
    assert grid is not None
    assert grid[1, 0] > 500 * grid[0, 0]
    assert float((expand_statistic(codes, grid) - values)[0, :256].abs().max()) < 0.003


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e60])
def test_what_cannot_be_stored_is_refused(dtype: torch.dtype, bad: float) -> None:
    with pytest.raises(IrqError, match="NaN, infinite or too large"):
        encode_statistic(torch.tensor([[1.0, bad]], dtype=torch.float64), dtype)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(IrqError, match="bfloat16"):
        encode_statistic(torch.ones(1, 1), torch.bfloat16)
