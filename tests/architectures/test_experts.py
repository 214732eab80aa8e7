"""Experts of a mixture beyond the whole way: parts kept, adapters on them, merges, refusals."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel

import irq_convert
from irq_convert.artifact.config import ModuleFormat
from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.verify import verify_artifact
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.forwards import orientation
from irq_convert.jobs.export.export import export
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import MergeOptions, MergeTo
from irq_convert.nn.experts import IrqExperts, cut_rows
from irq_convert.nn.linear import IrqLinear
from irq_convert.nn.packed import statistics_parameters
from tests.folders import change_tensors

from .journey import (
    TOLERANCE,
    agree,
    dense_model,
    dense_twin,
    quantize_kind,
    step,
    stored_bytes,
)
from .zoo import BY_NAME, Kind, inputs, logits, write_checkpoint

EACH = r".*\.experts\.\d+\.\w+"


def make(kind: Kind, folder: Path, **options: Any) -> Path:
    write_checkpoint(kind, folder / "source")
    quantize_kind(kind, folder / "source", folder / "artifact", **options)
    return folder / "artifact"


def load(artifact: Path) -> Any:
    return irq_convert.load(artifact, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("Mixtral", r"layers\.0\..*experts"),  # one layer as transformers stacks it, one packed
        ("Mixtral", r"layers\.1\..*experts\.2\.w1"),  # one matrix of one expert
        ("Qwen 3 MoE, fused", r"layers\.0\..*experts\.gate_up_proj"),  # one of two stacks
        ("Qwen 3 VL MoE", r"layers\.1\..*experts"),  # a layer that transformers turns round
    ],
)
def test_experts_kept_in_part(name: str, keep: str, tmp_path: Path) -> None:
    kind = BY_NAME[name]
    artifact = make(kind, tmp_path, keep=(keep,))
    model = load(artifact)
    wanted = logits(dense_twin(kind, artifact, tmp_path / "dense"), kind)
    assert float((logits(model, kind) - wanted).abs().max()) <= TOLERANCE
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert agree(logits(again, kind), logits(model, kind))
    assert stored_bytes(tmp_path / "saved") == stored_bytes(artifact)
    again.save_pretrained(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(artifact)


@pytest.mark.parametrize("name", ["Mixtral", "Granite MoE", "GPT-2"])
def test_base_model_alone(name: str, tmp_path: Path) -> None:
    kind = BY_NAME[name]
    artifact = make(kind, tmp_path)
    base = AutoModel.from_pretrained(artifact, dtype=torch.float32)
    whole = load(artifact)
    with torch.no_grad():
        wanted = whole(**inputs(kind), output_hidden_states=True).hidden_states[-1]
        assert agree(base(**inputs(kind)).last_hidden_state, wanted)


@pytest.mark.parametrize("name", ["Mixtral", "Llama 4", "gpt-oss", "GPT-2", "Qwen 3 MoE, fused"])
def test_dense_again(name: str, tmp_path: Path) -> None:
    """Dequantized in memory, and exported, both equal; what is saved loads in transformers."""
    kind = BY_NAME[name]
    artifact = make(kind, tmp_path)
    model = load(artifact)
    wanted = logits(model, kind)
    dense = model.dequantize()
    assert not [m for m in dense.modules() if isinstance(m, IrqLinear | IrqExperts)]
    assert float((logits(dense, kind) - wanted).abs().max()) <= TOLERANCE
    dense.save_pretrained(tmp_path / "dense")
    again = dense_model(kind, tmp_path / "dense")
    assert float((logits(again, kind) - wanted).abs().max()) <= TOLERANCE
    export(artifact, tmp_path / "expanded", to="dense")
    expanded = dense_model(kind, tmp_path / "expanded")
    assert float((logits(expanded, kind) - wanted).abs().max()) <= TOLERANCE
    source = stored_bytes(tmp_path / "source")
    shapes = {name: shape for name, (_, shape, _) in stored_bytes(tmp_path / "expanded").items()}
    assert shapes == {name: shape for name, (_, shape, _) in source.items()}


@pytest.mark.parametrize("name", ["GPT-2", "gpt-oss", "Mixtral"])
def test_verify_against_the_source(name: str, tmp_path: Path) -> None:
    artifact = make(BY_NAME[name], tmp_path)
    report = verify_artifact(artifact, against=open_checkpoint(tmp_path / "source"))
    assert not report.failures
    change_tensors(tmp_path / "source", other_source)
    report = verify_artifact(artifact, against=open_checkpoint(tmp_path / "source"))
    assert any("relative error" in line for line in report.failures)


def other_source(tensors: dict[str, torch.Tensor]) -> None:
    """Inputs and outputs of every square or stacked weight exchanged: same shapes, other order."""
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and ".mlp." not in name:
            tensors[name] = tensor.flip(-1).contiguous()


@pytest.mark.parametrize("name", ["GPT-2", "Llama 4"])
def test_tiles_and_panels_change_no_byte(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make(BY_NAME[name], tmp_path)
    monkeypatch.setattr("irq_convert.checkpoint.columns.PANEL_BYTES", 4096)
    quantize_kind(BY_NAME[name], tmp_path / "source", tmp_path / "other", tile_weights=64)
    assert stored_bytes(tmp_path / "other") == stored_bytes(artifact)


def noisy(model: Any, targets: str) -> Any:
    """`model` with adapters that change its logits."""
    config = irq_convert.IecLoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    adapted = irq_convert.attach(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


@pytest.mark.parametrize(("name", "targets"), [("Mixtral", EACH), ("GPT-2", "all-linear")])
def test_adapters_merge_into_experts_and_transposed_layers(
    name: str, targets: str, tmp_path: Path
) -> None:
    kind = BY_NAME[name]
    artifact = make(kind, tmp_path)
    before = logits(load(artifact), kind)
    adapted = noisy(load(artifact), targets)
    wanted = logits(adapted, kind)
    assert float((wanted - before).abs().max()) > 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    merge(artifact, tmp_path / "adapter", tmp_path / "m", MergeOptions(to=MergeTo.DENSE))
    merged = dense_model(kind, tmp_path / "m")
    assert float((logits(merged, kind) - wanted).abs().max()) <= TOLERANCE
    inside = adapted.merge_and_unload()
    assert float((logits(inside, kind) - wanted).abs().max()) <= TOLERANCE
    inside.save_pretrained(tmp_path / "inside")
    again = load(tmp_path / "inside")
    assert agree(logits(again, kind), logits(inside, kind))
    again.save_pretrained(tmp_path / "again")
    assert stored_bytes(tmp_path / "again") == stored_bytes(tmp_path / "inside")


def test_adapters_of_single_experts_learn(tmp_path: Path) -> None:
    kind = BY_NAME["Mixtral"]
    learned, adapters = step(load(make(kind, tmp_path)), kind, EACH)
    assert adapters == 2 * 4 * 3
    assert learned == adapters  # every expert is given a token


def test_a_plain_adapter_of_experts_is_refused(tmp_path: Path) -> None:
    kind = BY_NAME["Mixtral"]
    artifact = make(kind, tmp_path)
    noisy(load(artifact), EACH).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"experts\.0\.w1.*merge --to dense"):
        merge(artifact, tmp_path / "adapter", tmp_path / "m", MergeOptions(to=MergeTo.ADAPTER))


@pytest.mark.parametrize("name", ["Qwen 3 MoE", "Qwen 3 MoE, fused"])
def test_all_linear_leaves_experts_out(name: str, tmp_path: Path) -> None:
    kind = BY_NAME[name]
    artifact = make(kind, tmp_path)
    for config in (irq_convert.IecLoraConfig, LoraConfig):
        adapted = irq_convert.attach(load(artifact), config(r=2, target_modules="all-linear"))
        found = {n for n, _ in adapted.named_parameters() if "lora_B" in n}
        assert len(found) == 2 * 4
        assert all("self_attn" in name for name in found)


def test_stock_peft_does_not_get_at_packed_stacks(tmp_path: Path) -> None:
    kind = BY_NAME["Qwen 3 MoE, fused"]
    artifact = make(kind, tmp_path)
    config = LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(UsageError, match="on packed experts"):
        irq_convert.attach(load(artifact), config)
    adapted = get_peft_model(load(artifact), config)
    with pytest.raises(IrqError, match=r"experts\.gate_up_proj .* is packed"):
        adapted(**inputs(kind))


def test_memory_of_backward_is_packed(tmp_path: Path) -> None:
    """Nothing as large as a dense expert is saved for the backward pass but what is stored."""
    kind = BY_NAME["Qwen 3 MoE, fused"]
    model = load(make(kind, tmp_path))
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(inputs(kind)["input_ids"]).requires_grad_()
    experts = model.model.layers[0].mlp.experts
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(embedded[0], torch.zeros(12, 1, dtype=torch.long), torch.ones(12, 1)).sum()
    dense = 2 * 24 * 32
    fresh = [t for t in saved if t.untyped_storage().data_ptr() not in stored]
    assert saved
    assert all(t.numel() < dense or t.shape[0] == 12 for t in fresh)


def test_experts_move_copy_and_pickle(tmp_path: Path) -> None:
    kind = BY_NAME["Qwen 3 MoE, fused"]
    model = load(make(kind, tmp_path))
    experts = model.model.layers[0].mlp.experts
    kinds = {name: part.dtype for name, part in experts.packed_parts().items()}
    assert kinds == experts.part_dtypes()
    assert set(experts.packed_parts().values()) & statistics_parameters(model)
    x, chosen, share = torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    wanted = experts(x, chosen, share)
    for twin in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert type(twin) is type(experts)
        assert agree(twin(x, chosen, share), wanted)
    model.to(torch.bfloat16)
    assert {name: part.dtype for name, part in experts.packed_parts().items()} == kinds
    assert experts.dense_dtype == torch.bfloat16
    half = experts(x.bfloat16(), chosen, share.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("rows", [5, 32])  # with the tail of a group, and in whole groups
def test_rows_of_one_expert(rows: int) -> None:
    dense = torch.randn(4 * rows, 130)
    q = quantize_tensor(dense, QuantSpec("nf3", 16))
    whole = dequantize_tensor(q)
    for expert in range(4):
        part = cut_rows(q, expert * rows, (expert + 1) * rows)
        assert torch.equal(dequantize_tensor(part), whole[expert * rows : (expert + 1) * rows])


def missing(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight_tau"]


def missing_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if ".1.block_sparse_moe.experts.3." in n]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [(missing, r"no .*experts\.2\.w1\.weight_tau"), (missing_expert, "do not hold all experts")],
)
def test_damaged_experts_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    artifact = make(BY_NAME["Mixtral"], tmp_path)
    change_tensors(artifact, change)
    with pytest.raises(IrqError, match=words):
        load(artifact)


class Linear(nn.Module):
    def forward(self, x: torch.Tensor, e: int) -> Any:
        if self.w is None:
            return x
        return nn.functional.linear(x, self.w[e]) + self.w.shape[0]


class Turned(nn.Module):
    def forward(self, x: torch.Tensor, e: int) -> Any:
        return torch.bmm(x, self.w), x @ self.w[e]


class Both(nn.Module):
    def forward(self, x: torch.Tensor, e: int) -> Any:
        return nn.functional.linear(x, self.w[e]) @ self.w[e]


class Other(nn.Module):
    def forward(self, x: torch.Tensor, e: int) -> Any:
        return nn.functional.linear(x, self.w[e]) + self.scaled()

    def scaled(self) -> Any:
        return self.w * 2


class Sliced(nn.Module):
    def forward(self, x: torch.Tensor, e: int) -> Any:
        return x @ self.w[e : e + 1]


class Unused(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x


@pytest.mark.parametrize(
    ("cls", "wanted"),
    [(Linear, False), (Turned, True), (Both, None), (Other, None), (Sliced, None), (Unused, None)],
)
def test_what_a_class_does_with_its_weights(cls: type[nn.Module], wanted: bool | None) -> None:
    assert orientation(cls, "w") is wanted


def test_a_class_that_does_more_stays_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = BY_NAME["Qwen 3 MoE, fused"]
    monkeypatch.setattr("irq_convert.hf.experts.orientation", lambda cls, parameter: None)
    write_checkpoint(kind, tmp_path / "source")
    report = quantize_kind(kind, tmp_path / "source", tmp_path / "artifact")
    assert report.share < 0.5
    assert any("Qwen3MoeExperts" in why for why in report.kept)
    quantized = open_artifact(tmp_path / "artifact").quantized
    assert not [tensor for tensor in quantized if "experts" in tensor.name]
    wanted = logits(dense_twin(kind, tmp_path / "artifact", tmp_path / "dense"), kind)
    assert agree(logits(load(tmp_path / "artifact"), kind), wanted)


def test_format_of_stacks(tmp_path: Path) -> None:
    opened = open_artifact(make(BY_NAME["gpt-oss"], tmp_path))
    name = "model.layers.0.mlp.experts.down_proj"
    stored = next(tensor for tensor in opened.quantized if tensor.name == name)
    assert stored.format == ModuleFormat("nf4", 16, transposed=True)
    assert stored.source_shape == (4, 56, 32)
    assert stored.stored_shape == (4, 32, 56)
    raw = opened.config.to_dict()["overrides"][name]
    assert raw == {"transposed": True}
