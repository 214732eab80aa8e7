"""Tiles as GGUF blocks: read back by the package gguf, codes kept, one rounding of d and m."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

from gguf.quants import dequantize  # noqa: E402

from irq_convert.core.dequantize import dequantize_tensor  # noqa: E402
from irq_convert.core.packing import pack_codes  # noqa: E402
from irq_convert.core.quantized import QuantizedTensor  # noqa: E402
from irq_convert.errors import IrqError  # noqa: E402
from irq_convert.jobs.export.gguf.encode import (  # noqa: E402
    encode_dense,
    encode_q4_1,
    fits_q4_1,
    row_nbytes,
)

Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


def random_tile(seed: int, codebook: str, block: int, rows: int, cols: int) -> QuantizedTensor:
    """Codes and float32 statistics at random, of sizes that weights have."""
    bits = int(codebook[-1])
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=draw, dtype=torch.uint8)
    blocks = (rows, -(-cols // block))
    scale = torch.rand(blocks, generator=draw) * 10.0 ** torch.randint(
        -3, 2, blocks, generator=draw
    )
    tau = torch.randn(blocks, generator=draw) * scale * 0.2
    return QuantizedTensor(pack_codes(codes, bits), scale, tau, None, None, cols, codebook, block)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    codebook=st.sampled_from(("int2", "int3", "int4")),
    block=st.sampled_from((32, 64, 128, 256)),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 9),
)
def test_q4_1_keeps_codes_and_rounds_d_and_m_once(
    seed: int, codebook: str, block: int, rows: int, blocks: int
) -> None:
    tile = random_tile(seed, codebook, block, rows, 32 * blocks)
    encoded = encode_q4_1(tile, "w")
    assert encoded.data.shape == (rows, row_nbytes(Q4_1, tile.cols))
    read = dequantize(encoded.data, Q4_1)
    np.testing.assert_allclose(read, encoded.values, rtol=1e-6, atol=1e-7)
    wanted = dequantize_tensor(tile).double().numpy()
    spread = tile.block_size // 32
    scale = tile.scale.double().numpy().repeat(spread, 1)[:, : tile.cols // 32].repeat(32, 1)
    tau = tile.tau.double().numpy().repeat(spread, 1)[:, : tile.cols // 32].repeat(32, 1)
    # Half a unit in the last place of d, times the code, and of m.
    bound = 2.0**-11 * (2 * scale + np.abs(tau - scale)) + 16 * 2.0**-25
    assert (np.abs(encoded.values - wanted) <= bound * (1 + 1e-6)).all()


def test_low_halves_are_the_first_sixteen() -> None:
    codes = (torch.arange(32, dtype=torch.uint8) % 16)[None].flip(1).contiguous()
    one = torch.full((1, 1), 7.5)
    tile = QuantizedTensor(pack_codes(codes, 4), one, one, None, None, 32, "int4", 32)
    data = encode_q4_1(tile, "w").data[0]
    assert data[:4].view("<f2").tolist() == [1.0, 0.0]
    assert [b & 15 for b in data[4:]] == codes[0, :16].tolist()
    assert [b >> 4 for b in data[4:]] == codes[0, 16:].tolist()


def test_what_fits() -> None:
    assert fits_q4_1("int4", 32, 96)
    assert fits_q4_1("int2", 128, 96)
    assert not fits_q4_1("int4", 16, 96)
    assert not fits_q4_1("int4", 32, 100)
    assert not fits_q4_1("nf4", 32, 96)


def test_beyond_float16_is_refused() -> None:
    tile = random_tile(0, "int4", 32, 1, 32)
    huge = QuantizedTensor(tile.codes, tile.scale + 1e6, tile.tau, None, None, 32, "int4", 32)
    with pytest.raises(IrqError, match=r"model\.w: .* beyond float16"):
        encode_q4_1(huge, "model.w")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_dense_types_read_back(kind: str) -> None:
    rows = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    number = gguf.GGMLQuantizationType[kind]
    encoded = encode_dense(rows, number, "w")
    assert encoded.data.shape == (7, row_nbytes(number, 96))
    data = encoded.data.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
    np.testing.assert_allclose(dequantize(data, number), encoded.values, rtol=1e-6, atol=1e-9)
    bound = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127}[kind]
    largest = rows.abs().amax(1, keepdim=True).double().numpy()
    assert (np.abs(encoded.values - rows.double().numpy()) <= bound * largest * 1.01).all()


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_too_large_for_the_type(kind: str) -> None:
    with pytest.raises(IrqError, match=r"w: holds 1e\+08, which .* cannot store"):
        encode_dense(torch.full((1, 32), 1e8), gguf.GGMLQuantizationType[kind], "w")
