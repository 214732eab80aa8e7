"""Decoded tensors in tiles: any rows, columns, chunks and views are those of the whole tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.checkpoint.buffers import torch_dtype
from irq_convert.checkpoint.fetcher import Fetcher
from irq_convert.checkpoint.fp8 import decode_fp8
from irq_convert.checkpoint.header import TensorInfo, matrix_shape
from irq_convert.checkpoint.mxfp4 import decode_mxfp4
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError
from tests.tiny import write_source, write_tensors

from .narrow import Tensors, assert_same, expanded, mxfp4_by_numpy, random_bytes, to_fp8


def stored(folder: Path, tensors: Tensors) -> dict[str, TensorInfo]:
    write_tensors(folder, tensors)
    return open_checkpoint(folder).tensors


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[TensorInfo, torch.Tensor]]:
    """Lazy tensors of both kinds with what they are as a whole."""
    tensors, found = {}, []
    for number, (shape, block) in enumerate([((37, 50), (8, 16)), ((3, 21, 40), (16, 16))]):
        name = f"{number}.weight"
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(torch.randn(shape), block)
    tensors["x_blocks"], tensors["x_scales"] = (
        random_bytes((3, 11, 2, 16), 0, 256),
        random_bytes((3, 11, 2), 120, 130),
    )
    infos = stored(tmp_path_factory.mktemp("narrow"), tensors)
    for number, block in enumerate([(8, 16), (16, 16)]):
        name = f"{number}.weight"
        scale = tensors[f"{name}_scale_inv"]
        info = decode_fp8(infos[name], infos[f"{name}_scale_inv"], block, "F32")
        weight = tensors[name].float()
        found.append((info, weight * expanded(scale, weight.shape, block)))
    info = decode_mxfp4({k: v for k, v in infos.items() if k[0] == "x"}, "BF16")["x"]
    found.append((info, mxfp4_by_numpy(tensors["x_blocks"], tensors["x_scales"]).bfloat16()))
    return found


@given(st.data())
@settings(max_examples=150)
def test_tiles_of_any_view_are_equal(
    dense: list[tuple[TensorInfo, torch.Tensor]], data: st.DataObject
) -> None:
    info, whole = data.draw(st.sampled_from(dense))
    *lead, rows, cols = info.shape
    flat = (torch.Size(lead).numel() * rows, cols)
    shapes = [info.shape, flat, (info.numel,), (1, *info.shape), (cols, info.numel // cols)]
    view = replace(info, shape=data.draw(st.sampled_from(shapes)))
    asked = whole.reshape(matrix_shape(view))
    start = data.draw(st.integers(0, len(asked)))
    stop = data.draw(st.integers(start, len(asked)))
    with TileReader() as reader:
        assert_same(reader.read_rows(view, start, stop), asked[start:stop])
        chunk = data.draw(st.integers(1, 3000))
        pieces = b"".join(bytes(piece) for piece in reader.iter_bytes(view, chunk))
    assert pieces == whole.contiguous().view(torch.uint8).numpy().tobytes()


@given(st.data())
@settings(max_examples=60)
def test_columns_are_those_of_the_rows(
    dense: list[tuple[TensorInfo, torch.Tensor]], data: st.DataObject
) -> None:
    info, whole = data.draw(st.sampled_from(dense))
    matrices = whole.reshape(-1, *info.shape[-2:])
    matrix = data.draw(st.integers(0, len(matrices) - 1))
    start = data.draw(st.integers(0, info.shape[-1]))
    stop = data.draw(st.integers(start, info.shape[-1]))
    with TileReader() as reader:
        found = reader.read_columns(info, matrix, start, stop)
    assert_same(found, matrices[matrix, :, start:stop])


def test_small_chunks_change_nothing(
    dense: list[tuple[TensorInfo, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irq_convert.checkpoint.dense_rows.CHUNK_ELEMENTS", 70)
    with TileReader() as reader:
        for info, whole in dense:
            assert_same(reader.read_tensor(info), whole)
            last = whole.reshape(-1, *info.shape[-2:])[-1]
            matrix = whole.numel() // last.numel() - 1
            assert_same(reader.read_columns(info, matrix, 0, info.shape[-1]), last)


class Recorder(Fetcher):
    """Notes what is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, ...]] = []

    def ensure(self, names: Sequence[str]) -> None:
        self.asked.append(tuple(names))


def test_both_files_are_asked_for_once(tmp_path: Path) -> None:
    weight, scale = to_fp8(torch.randn(40, 16), (8, 8))
    norms = {"a": torch.ones(2), "b": torch.ones(3)}
    tensors = {"a": norms["a"], "x.weight": weight, "x.weight_scale_inv": scale, "b": norms["b"]}
    setting = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    source = write_source(tmp_path / "m", tensors, {"quantization_config": setting}, 2, files={})
    checkpoint = replace(open_checkpoint(source), fetcher=Recorder())
    infos = checkpoint.tensors
    with TileReader(read_order=checkpoint.read_order(infos.values())) as reader:
        for info in infos.values():
            rows = matrix_shape(info)[0]
            tiles = [reader.read_rows(info, row, row + 1) for row in range(rows)]
            if info.name in norms:
                assert_same(tiles[0][0], norms[info.name])
    assert isinstance(checkpoint.fetcher, Recorder)
    one, two = (path.name for path in checkpoint.shards)
    assert {info.name: checkpoint.files_of(info) for info in infos.values()}["x.weight"] == [
        two,
        one,
    ]
    assert checkpoint.fetcher.asked.count((two, one)) == 1


def test_every_byte_and_scale_of_mxfp4(tmp_path: Path) -> None:
    """Against transformers' function alone: scales from 2^-127 on, in each dtype."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16)
    infos = stored(tmp_path, {"x_blocks": blocks, "x_scales": scales})
    for dtype in ("BF16", "F32"):
        info = decode_mxfp4(infos, dtype)["x"]
        with TileReader() as reader:
            found = reader.read_tensor(info)
        assert_same(found, convert_moe_packed_tensors(blocks, scales, dtype=torch_dtype(dtype)))


def test_what_is_no_number_or_too_large_is_refused(tmp_path: Path) -> None:
    blocks, scales = random_bytes((1, 2, 1, 16), 0, 256), torch.tensor([[[127], [255]]])
    infos = stored(tmp_path / "a", {"x_blocks": blocks, "x_scales": scales.to(torch.uint8)})
    with TileReader() as reader, pytest.raises(IrqError, match="x_scales has a scale of 255"):
        reader.read_tensor(decode_mxfp4(infos, "BF16")["x"])
    weight = torch.full((2, 2), 448.0).to(torch.float8_e4m3fn)
    infos = stored(tmp_path / "b", {"w": weight, "s": torch.tensor(200.0)})
    with TileReader() as reader, pytest.raises(IrqError, match=r"w stands for 89600, .*float16"):
        reader.read_tensor(decode_fp8(infos["w"], infos["s"], None, "F16"))
