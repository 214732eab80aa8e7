"""The writer against the golden vectors: the files in the repository are what it makes today."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from irq_convert.artifact.contents import open_artifact, read_quantized
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.dequantize import dequantize_tensor
from tests.formats import make_vectors


def test_the_writer_makes_the_golden_vectors(tmp_path: Path) -> None:
    make_vectors.write_all(tmp_path)
    names = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) == 4 * 8
    for name in names:
        assert (tmp_path / name).read_bytes() == (make_vectors.FOLDER / name).read_bytes(), name


def test_our_reader_reads_the_golden_vectors() -> None:
    for folder in sorted(path for path in make_vectors.FOLDER.iterdir() if path.is_dir()):
        artifact, dense = open_artifact(folder), load_file(folder / "dense.safetensors")
        assert {tensor.name for tensor in artifact.quantized} == set(dense)
        with TileReader() as reader:
            for tensor in artifact.quantized:
                stored = read_quantized(reader, tensor, 0, tensor.shape.rows)
                values = dequantize_tensor(stored).reshape(tensor.stored_shape)
                values = values.mT if tensor.format.transposed else values
                assert torch.equal(values, dense[tensor.name])
