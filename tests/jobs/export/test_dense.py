"""`--to dense`: the weights that the artifact stands for, and quantizing them again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from irq_convert.artifact.contents import open_artifact, read_quantized
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.packing import unpack_codes
from irq_convert.core.spec import QuantSpec
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.report import ExportReport
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import read_tensors
from tests.paths import DEMO

from .compare import decoded


def export_dense(artifact: Path, out: Path, dtype: str = "auto", **more: int) -> ExportReport:
    return export(artifact, out, ExportOptions("dense", dtype=dtype, **more))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_every_weight_rounded_once(nf4: Path, tmp_path: Path, dtype: str) -> None:
    report = export_dense(nf4, tmp_path / "out", dtype, tile_weights=5000, max_shard_bytes=200_000)
    wanted = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    ours, found = decoded(nf4), read_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {wanted}
    for name, weight in ours.items():
        assert torch.equal(found[name], weight.to(wanted)), name
    largest = max(float((w.to(wanted).double() - w.double()).abs().max()) for w in ours.values())
    assert report.largest == largest
    assert (report.relative_error == 0) == (dtype == "float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(wanted).removeprefix("torch.")


def test_it_loads(nf4: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_dense(nf4, tmp_path / "out", "float32")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for name, weight in decoded(nf4).items():
        assert torch.equal(model.get_parameter(name), weight)


def codes(artifact: Path) -> torch.Tensor:
    """All codes of an artifact in a row."""
    found = []
    with TileReader() as reader:
        for tensor in open_artifact(artifact).quantized:
            stored = read_quantized(reader, tensor, 0, tensor.shape.rows)
            found.append(unpack_codes(stored.codes, tensor.shape.bits, tensor.shape.cols))
    return torch.cat([part.flatten() for part in found])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codebook", "objective", "least"),
    [
        ("nf4", "none", 1.0),
        ("int3", "none", 1.0),
        ("nf3", "entropy", 0.9999),
        ("int3", "entropy", 0.9999),
        ("int4", "entropy", 0.999),
        ("nf4", "entropy", 0.98),
        ("nf2", "entropy", 0.95),
    ],
)
def test_round_trip(tmp_path: Path, codebook: str, objective: str, least: float) -> None:
    """Dense and quantized again with the same options: docs/export.md explains what differs."""
    options = QuantizeOptions(QuantSpec(codebook, 64, objective), threads=1)
    quantize(str(DEMO), tmp_path / "first", options)
    export_dense(tmp_path / "first", tmp_path / "dense")
    quantize(str(tmp_path / "dense"), tmp_path / "second", options)
    first, second = codes(tmp_path / "first"), codes(tmp_path / "second")
    assert float((first == second).double().mean()) >= least
    assert int((first.int() - second.int()).abs().max()) <= 1
