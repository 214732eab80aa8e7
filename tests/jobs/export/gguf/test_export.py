"""Whole files, read by the package gguf and run by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

from gguf.quants import dequantize  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor  # noqa: E402

import irq_convert  # noqa: E402
from irq_convert.artifact.config import ModuleFormat  # noqa: E402
from irq_convert.errors import UsageError  # noqa: E402
from irq_convert.jobs.export.export import estimate_export, export  # noqa: E402
from irq_convert.jobs.export.options import ExportOptions  # noqa: E402

from .make import FAMILIES, change_config, export_gguf, make_artifact, readable_model  # noqa: E402

IDS = torch.tensor([[0, 5, 90, 700, 33, 512, 8, 1023, 64, 2, 19]])


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields by key and tensors by name, as gguf's reader has them."""
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def dense(tensor: Any) -> np.ndarray:
    return dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *(("llama", False), ("qwen3", True)),
        *(pytest.param(f, False, marks=pytest.mark.slow) for f in FAMILIES if f != "llama"),
        pytest.param("llama", True, marks=pytest.mark.slow),
    ],
)
def test_transformers_computes_the_same(tmp_path: Path, family: str, tied: bool) -> None:
    make_artifact(tmp_path / "a", readable_model(family, tied))
    file, report = export_gguf(tmp_path / "a", tmp_path / "out")
    assert file.name == "a-Q4_1.gguf"
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    ours = irq_convert.load(tmp_path / "a").eval()
    with torch.no_grad():
        expected, found = ours(IDS).logits, theirs(IDS).logits
    gap = float((expected - found).abs().max() / expected.abs().max())
    assert gap < 4e-3, gap
    assert len(report.differences) == 14
    assert 0 < report.relative_error < 1e-6
    fields, tensors = contents(file)
    arch = "llama" if family in ("llama", "mistral") else family
    assert fields["general.architecture"] == arch
    assert fields[f"{arch}.attention.head_count_kv"] == 2
    assert fields[f"{arch}.context_length"] == 128
    assert fields[f"{arch}.rope.freq_base"] == 20000.0
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
    kinds = {tensor.tensor_type.name for tensor in tensors.values()}
    assert kinds == {"Q4_1", "F32"}
    assert ("output.weight" in tensors) is not tied


def test_rows_return_to_their_places(tmp_path: Path) -> None:
    own = make_artifact(tmp_path / "a", readable_model("llama", attention_bias=True, mlp_bias=True))
    file, _ = export_gguf(tmp_path / "a", tmp_path / "out")
    _, tensors = contents(file)
    for name, heads in (("q", 6), ("k", 2)):
        for part in ("weight", "bias"):
            there = dense(tensors[f"blk.1.attn_{name}.{part}"])
            found = LlamaTensorProcessor()._reverse_permute_weights(there, heads)
            expected = own[f"model.layers.1.self_attn.{name}_proj.{part}"].numpy()
            np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
    exact = own["model.layers.0.mlp.down_proj.bias"].numpy()
    assert (dense(tensors["blk.0.ffn_down.bias"]) == exact).all()
    assert (dense(tensors["token_embd.weight"]) == own["model.embed_tokens.weight"].numpy()).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codebook", "block"),
    [
        *(("nf2", 64), ("nf3", 16), ("nf4", 32)),
        *(("int2", 32), ("int3", 64)),
        *(("int4", 16), ("int4", 32), ("int4", 64), ("int4", 128)),
    ],
)
def test_every_codebook(tmp_path: Path, codebook: str, block: int) -> None:
    own = make_artifact(
        tmp_path / "a", readable_model("llama"), ModuleFormat(codebook, block), torch.bfloat16
    )
    file, report = export_gguf(tmp_path / "a", tmp_path / "out")
    _, tensors = contents(file)
    fits = codebook.startswith("int") and block >= 32
    found = tensors["blk.0.attn_v.weight"]
    assert found.tensor_type.name == ("Q4_1" if fits else "BF16")
    expected = own["model.layers.0.self_attn.v_proj.weight"].numpy()
    gap = np.abs(dense(found).astype(np.float64) - expected)
    by_name = {seen.name: seen for seen in report.differences}
    seen = by_name["model.layers.0.self_attn.v_proj.weight"]
    assert seen.largest == pytest.approx(gap.max(), rel=1e-4)
    assert gap.max() <= (2.0**-10 if fits else 2.0**-8) * 2 * np.abs(expected).max()
    (storage,) = report.storages
    assert storage.exact
    assert (storage.why is None) is (fits and codebook == "int4")


@pytest.mark.parametrize("fallback", ["f16", "bf16", "f32", "q8_0"])
def test_fallback_for_what_q4_1_cannot_hold(tmp_path: Path, fallback: str) -> None:
    make_artifact(tmp_path / "a", readable_model("llama", intermediate_size=172))
    file, report = export_gguf(tmp_path / "a", tmp_path / "out", fallback=fallback)
    _, tensors = contents(file)
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q4_1"
    wanted = "F32" if fallback == "q8_0" else fallback.upper()  # rows of 172 fill no blocks
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == wanted
    (why,) = {storage.why for storage in report.storages} - {None}
    assert "whole blocks of 32" in why


def test_q8_0_for_nf(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a", readable_model("llama"), ModuleFormat("nf4", 64))
    file, report = export_gguf(tmp_path / "a", tmp_path / "out", fallback="q8_0", dtype="q8_0")
    assert file.name == "a-Q8_0.gguf"
    _, tensors = contents(file)
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert 0 < report.relative_error < 1e-4
    (storage,) = report.storages
    assert not storage.exact
    assert any("model.embed_tokens.weight as Q8_0" in note for note in report.notes)


@pytest.mark.slow
def test_tiles_change_no_byte(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a", readable_model("qwen2"))
    make_artifact(tmp_path / "b", readable_model("llama"), ModuleFormat("int3", 64))
    for name in "ab":
        one, _ = export_gguf(tmp_path / name, tmp_path / f"{name}1")
        two, _ = export_gguf(tmp_path / name, tmp_path / f"{name}2", tile_weights=1)
        assert one.read_bytes() == two.read_bytes()


def test_a_dry_run_knows_the_size(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a", readable_model("qwen3"))
    planned = estimate_export(tmp_path / "a", tmp_path / "out", ExportOptions(to="gguf"))
    assert not (tmp_path / "out").exists()
    file, _ = export_gguf(tmp_path / "a", tmp_path / "out")
    assert planned.files == {file.name: file.stat().st_size}


def test_rope_scalings(tmp_path: Path) -> None:
    rope = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    make_artifact(
        tmp_path / "y", readable_model("qwen2", rope_parameters={**rope, "rope_type": "yarn"})
    )
    fields, _ = contents(export_gguf(tmp_path / "y", tmp_path / "y.out")[0])
    assert fields["qwen2.rope.scaling.type"] == "yarn"
    assert fields["qwen2.rope.scaling.factor"] == 4.0
    assert fields["qwen2.rope.scaling.original_context_length"] == 32
    llama3 = {**rope, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    make_artifact(tmp_path / "l", readable_model("llama", rope_parameters=llama3))
    fields, tensors = contents(export_gguf(tmp_path / "l", tmp_path / "l.out")[0])
    assert "llama.rope.scaling.type" not in fields
    assert dense(tensors["rope_freqs.weight"]).shape == (8,)


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    make_artifact(tmp_path / "a", readable_model("llama"))
    change_config(tmp_path / "a", model_type="gemma2")
    with pytest.raises(UsageError, match="--to gguf knows llama, mistral, qwen2, qwen3"):
        export(tmp_path / "a", tmp_path / "out", ExportOptions(to="gguf"))
    change_config(tmp_path / "a", model_type="llama")
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="no tokenizer"):
        export(tmp_path / "a", tmp_path / "out", ExportOptions(to="gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
