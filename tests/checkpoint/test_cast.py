"""Narrowing: what is finite stays finite, pieces land where they belong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.checkpoint.buffers import tensor_bytes, torch_dtype
from irq_convert.checkpoint.cast import cast_bytes, narrow
from irq_convert.errors import IrqError

FLOATS = ["F64", "F32", "BF16", "F16"]


@given(st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(1, 9), st.integers(0, 99))
def test_pieces_are_the_whole(source: str, target: str, step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(23, generator=generator).to(torch_dtype(source))
    data, size = bytes(tensor_bytes(values)), values.element_size()
    result = bytearray(23 * torch_dtype(target).itemsize)
    for at in range(0, len(data), step * size):
        piece, to = cast_bytes(data[at : at + step * size], at, source, target, "x")
        result[to : to + len(piece)] = piece
    assert bytes(result) == bytes(tensor_bytes(values.to(torch_dtype(target))))


def test_finite_numbers_have_to_stay_so() -> None:
    odd = torch.tensor([1.0, float("nan"), float("inf")])
    assert torch.equal(narrow(odd, "F16", "x").isnan(), odd.isnan())
    message = r"x: holds 1e\+06, which is too large for float16: choose --dtype bfloat16 or float32"
    with pytest.raises(IrqError, match=message):
        narrow(torch.tensor([float("inf"), -1e6, 2.0]), "F16", "x")
