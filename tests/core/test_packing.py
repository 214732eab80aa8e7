"""Packing codes: round trips, the layout bit by bit, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.core.packing import pack_codes, unpack_codes
from irq_convert.errors import IrqError, UsageError

from .oracle import pack_bits


@given(
    bits=st.sampled_from([2, 3, 4]),
    rows=st.integers(0, 5),
    cols=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_pack_is_the_bit_stream_and_unpack_inverts_it(
    bits: int, rows: int, cols: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    packed = pack_codes(torch.from_numpy(codes), bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    if rows:
        np.testing.assert_array_equal(packed.numpy(), pack_bits(codes, bits))
    assert packed.shape == (rows, -(-cols * bits // 8))
    np.testing.assert_array_equal(unpack_codes(packed, bits, cols).numpy(), codes)


def test_layout_of_the_specification() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x43, 0x65, 0x07]]
    word = sum(int(code) << 3 * i for i, code in enumerate(codes[0]))
    assert pack_codes(codes, 3).tolist() == [list(word.to_bytes(3, "little"))]
    assert pack_codes(codes % 4, 2).tolist() == [[0b00111001, 0b00111001]]


def test_unused_bits_are_zero_and_non_contiguous_input_works() -> None:
    codes = torch.full((3, 5), 7, dtype=torch.uint8)
    assert pack_codes(codes, 3)[:, -1].tolist() == [0x7F] * 3
    turned = torch.arange(15, dtype=torch.uint8).view(5, 3).t() % 8
    assert torch.equal(unpack_codes(pack_codes(turned, 3), 3, 5), turned)


def test_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="code of 8 does not fit in 3 bits"):
        pack_codes(torch.tensor([[1, 8]], dtype=torch.uint8), 3)


def test_rows_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(IrqError, match=r"have 4 bytes, but 7 codes of 3 bits need 3"):
        unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 3, 7)
