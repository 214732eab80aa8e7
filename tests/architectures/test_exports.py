"""Mixtures and transposed layers on their way out: what readers load right, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import irq_convert
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError
from irq_convert.jobs.export.export import export
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import MergeOptions, MergeTo
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize

from .journey import TOLERANCE, quantize_kind
from .zoo import BY_NAME, Kind, logits, write_checkpoint

WIDE = {"hidden_size": 64, "intermediate_size": 128}


def integer(name: str, folder: Path, keep: tuple[str, ...] = ()) -> tuple[Kind, Path]:
    """An artifact that the plain layers of fit every target, in blocks of 32."""
    kind = BY_NAME[name]
    more = {"n_embd": 64} if name == "GPT-2" else WIDE
    kind = replace(kind, values={**kind.values, **more})
    write_checkpoint(kind, folder / "source")
    spec = QuantSpec("int4", 32, objective="mse", zero_point="integer")
    options = QuantizeOptions(spec, threads=1, keep=keep)
    quantize(str(folder / "source"), folder / "artifact", options)
    return kind, folder / "artifact"


def ours(artifact: Path, kind: Kind) -> torch.Tensor:
    return logits(irq_convert.load(artifact, dtype=torch.float32), kind)


@pytest.mark.parametrize("name", ["Mixtral", "OLMoE", "Granite MoE"])
def test_mlx_runs_mixtures(name: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    import numpy as np

    from .zoo import inputs

    kind, artifact = integer(name, tmp_path)
    report = export(artifact, tmp_path / "out", ExportOptions("mlx"))
    assert not any("not tried" in note for note in report.notes)
    model, _ = utils.load_model(tmp_path / "out")
    found = np.array(model(mx.array(inputs(kind)["input_ids"].numpy())).astype(mx.float32))
    assert float((torch.from_numpy(found) - ours(artifact, kind)).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["Mixtral, fused", "Granite MoE", "gpt-oss"])
def test_transformers_reads_packed_layers_beside_dense_stacks(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    kind, artifact = integer(name, tmp_path)
    report = export(artifact, tmp_path / "out", ExportOptions("compressed-tensors"))
    assert "it is a stack of matrices" in {storage.why for storage in report.storages}
    model, info = getattr(transformers, kind.model).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert float((logits(model, kind) - ours(artifact, kind)).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("name", "to", "words"),
    [
        ("GPT-2", "mlx", "the transpose of a linear layer's weight"),
        ("GPT-2", "compressed-tensors", "the transpose of a linear layer's weight"),
        ("GPT-2", "gguf", "model_type 'gpt2'"),
        ("Mixtral", "compressed-tensors", r"experts\.0\.w1\.weight: is of one expert"),
        ("Mixtral", "gguf", "model_type 'mixtral'"),
        ("Mixtral, fused", "mlx", "held stacked"),
        ("Qwen 3 MoE", "mlx", "held each for itself"),
        ("Llama 4", "mlx", "held stacked"),
        ("Llama 4", "compressed-tensors", "would leave them random"),
        ("Llama 4", "gguf", "model_type 'llama4_text'"),
    ],
)
def test_what_no_reader_loads_right_is_refused(
    name: str, to: str, words: str, tmp_path: Path
) -> None:
    artifact = integer(name, tmp_path)[1]
    with pytest.raises(UsageError, match=words) as raised:
        export(artifact, tmp_path / "out", ExportOptions(to))
    assert "--to dense" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_experts_that_differ_cannot_be_stacked(tmp_path: Path) -> None:
    artifact = integer("Mixtral", tmp_path, keep=(r"layers\.0\..*experts\.2\.w1",))[1]
    with pytest.raises(UsageError, match=r"experts\.\d\.w1.*stored in another way"):
        export(artifact, tmp_path / "out", ExportOptions("mlx"))


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, "block"])
@pytest.mark.parametrize("name", ["Mixtral", "GPT-2"])
def test_folded_adapters_load_into_stock_models(name: str, pool: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    kind = BY_NAME[name]
    write_checkpoint(kind, tmp_path / "source")
    quantize_kind(kind, tmp_path / "source", tmp_path / "artifact")
    model = irq_convert.load(tmp_path / "artifact", dtype=torch.float32)
    config = irq_convert.IecLoraConfig(r=2, pool=pool, lora_dropout=0.1, task_type="CAUSAL_LM")
    adapted = irq_convert.attach(model, config).eval()
    for number, (part, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in part:
            generator = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    wanted = logits(adapted, kind)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    to = MergeOptions(to=MergeTo.ADAPTER)
    merge(tmp_path / "artifact", tmp_path / "adapter", tmp_path / "plain", to)
    export(tmp_path / "artifact", tmp_path / "dense", ExportOptions("dense"))
    dense = getattr(transformers, kind.model).from_pretrained(tmp_path / "dense")
    stock = PeftModel.from_pretrained(dense, str(tmp_path / "plain")).eval()
    assert float((logits(stock, kind) - wanted).abs().max()) <= 5 * TOLERANCE
