"""Integer zero points: found where they are, and fitted where they are not."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.core.codebook import get_codebook
from irq_convert.jobs.export.zero_points import constant_codes, refit, zero_points

BITS = st.sampled_from((2, 3, 4))


def levels(bits: int) -> torch.Tensor:
    return torch.from_numpy(get_codebook(f"int{bits}").level_array())


@given(bits=BITS, scale=st.floats(2.0**-100, 2.0**60, width=32), data=st.data())
def test_every_zero_point_is_found(bits: int, scale: float, data: st.DataObject) -> None:
    zero = data.draw(st.integers(0, (1 << bits) - 1))
    scales = torch.tensor([[scale]], dtype=torch.float32)
    found = zero_points(scales, -(levels(bits)[zero] * scales), bits)
    assert bool(found.exact.all())
    assert int(found.zero_point) == zero
    assert not bool(found.constant.any())
    assert float(found.step) == 2 * float(scales) / ((1 << bits) - 1)


@given(bits=BITS, zero=st.integers(0, 15), ulps=st.integers(1, 1000), up=st.booleans())
def test_a_unit_off_is_off(bits: int, zero: int, ulps: int, up: bool) -> None:
    scale = torch.tensor([[0.37]])
    exact = -(levels(bits)[zero % (1 << bits)] * scale)
    tau = (exact.view(torch.int32) + (ulps if up else -ulps)).view(torch.float32)
    assert not bool(zero_points(scale, tau, bits).exact.any())


def test_constant_blocks_are_exact() -> None:
    tau = torch.tensor([[0.5, -0.25, 0.0, -0.0]])
    found = zero_points(torch.zeros_like(tau), tau, 2)
    assert bool(found.exact.all())
    codes = constant_codes(found, tau)
    values = (codes.double() - found.zero_point.double()) * found.step
    assert torch.equal(values, tau.double())
    assert int(codes.max()) <= 3


def errors(dense: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    codes, zero, step = parts
    offset = codes.double() - zero.double()[:, :, None]
    return (offset * step[:, :, None] - dense.double()).square().sum(2)


@given(bits=BITS, seed=st.integers(0, 2**32 - 1), shift=st.floats(-3, 3))
def test_refitting_beats_keeping_and_rounding(bits: int, seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, 4, 16), generator=generator, dtype=torch.uint8)
    scale = torch.rand(3, 4, generator=generator) + 0.1
    tau = (torch.randn(3, 4, generator=generator) + shift) * scale
    dense = levels(bits)[codes.int()] * scale[:, :, None] + tau[:, :, None]
    found = zero_points(scale, tau, bits)
    best = refit(dense, codes, found, bits)
    assert int(best.codes.max()) < 1 << bits
    assert int(best.zero_point.max()) < 1 << bits
    assert bool((best.step >= 0).all())
    error = errors(dense, best.codes, best.zero_point, best.step)
    kept = errors(dense, codes, found.zero_point, found.step)
    assert bool((error <= kept * (1 + 1e-9)).all())
    low, high = dense.amin(2).clamp(max=0).double(), dense.amax(2).clamp(min=0).double()
    step = (high - low) / ((1 << bits) - 1)
    zero = (-low / step).round()
    nearest = ((dense.double() / step[:, :, None]).round() + zero[:, :, None]).clamp(
        0, (1 << bits) - 1
    )
    assert bool((error <= errors(dense, nearest, zero, step) * (1 + 1e-9)).all())


def test_zeros_stay_zeros() -> None:
    best = refit(torch.zeros(1, 1, 8), None, None, 3)
    assert bool((errors(torch.zeros(1, 1, 8), best.codes, best.zero_point, best.step) == 0).all())
