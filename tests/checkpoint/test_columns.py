"""Transposes read and written as streams of panels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from irq_convert.checkpoint import columns
from irq_convert.checkpoint.columns import TransposedWriter, row_tiles
from irq_convert.checkpoint.header import TensorInfo, read_header
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write(folder: Path, tensor: torch.Tensor) -> TensorInfo:
    save_file({"before": torch.zeros(3), "x": tensor}, folder / "x.safetensors")
    return read_header(folder / "x.safetensors").tensors["x"]


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    dtype=st.sampled_from(sorted(DTYPES)),
    step=st.integers(1, 12),
    panel=st.integers(1, 400),
)
def test_rows_of_the_transpose_and_back(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: str, step: int, panel: int
) -> None:
    folder = tmp_path_factory.mktemp("columns")
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(DTYPES[dtype])
    info = write(folder, tensor)
    with pytest.MonkeyPatch.context() as patch, TileReader() as reader:
        patch.setattr(columns, "PANEL_BYTES", panel)
        tiles = list(row_tiles(reader, info, step, transposed=True))
        assert [start for start, _ in tiles] == list(range(0, info.numel // shape[-2], step))
        assert all(tile.is_contiguous() and tile.shape[0] <= step for _, tile in tiles)
        assert torch.equal(torch.cat([t for _, t in tiles]), tensor.mT.reshape(-1, shape[-2]))
        with ShardWriter(folder / "y.safetensors", [TensorSpec("x", dtype, info.shape)]) as writer:
            back = TransposedWriter(
                info.shape,
                lambda data, at: writer.write("x", data, at),
                DTYPES[dtype].itemsize,
            )
            for _, tile in tiles:
                back.add(tile)
    assert torch.equal(load_file(folder / "y.safetensors")["x"], tensor)


def test_rows_as_they_lie(tmp_path: Path) -> None:
    tensor = torch.arange(60.0).reshape(3, 4, 5)
    info = write(tmp_path, tensor)
    with TileReader() as reader:
        tiles = list(row_tiles(reader, info, 5, transposed=False))
    assert [start for start, _ in tiles] == [0, 5, 10]
    assert torch.equal(torch.cat([tile for _, tile in tiles]), tensor.reshape(12, 5))


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(2, 16, 24)
    info = write(tmp_path, tensor)
    seen: list[tuple[int, int]] = []
    real = TileReader._read_into

    def count(self: TileReader, info: TensorInfo, at: int, view: Any) -> None:
        seen.append((at, len(view)))
        real(self, info, at, view)

    monkeypatch.setattr(TileReader, "_read_into", count)
    monkeypatch.setattr(columns, "PANEL_BYTES", 16 * 4 * 8)
    with TileReader() as reader:
        list(row_tiles(reader, info, 2, transposed=True))
    assert sum(size for _, size in seen) == info.nbytes
    assert len({at for at, _ in seen}) == len(seen)
    assert {size for _, size in seen} == {8 * 4}  # runs as wide as a panel, not as a tile


@pytest.mark.parametrize(("matrix", "start", "stop"), [(0, 0, 6), (0, 3, 2), (2, 0, 1), (-1, 0, 1)])
def test_columns_that_do_not_exist(tmp_path: Path, matrix: int, start: int, stop: int) -> None:
    info = write(tmp_path, torch.zeros(2, 4, 5))
    with TileReader() as reader, pytest.raises(ValueError, match="no columns"):
        reader.read_columns(info, matrix, start, stop)
