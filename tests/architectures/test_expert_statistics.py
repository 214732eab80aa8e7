"""Scale and tau of experts, in every layout: trained, saved, merged, put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import irq_convert
from irq_convert.adapters.experts import IecLoraExperts, stacks
from irq_convert.adapters.layer import IecLoraLinear
from irq_convert.artifact.contents import open_artifact
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.finetune.moves import round_statistics
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import MergeOptions, MergeTo, TauDtype
from irq_convert.nn.experts import IrqExperts
from tests.folders import read_tensors

from .journey import TOLERANCE, dense_model
from .test_experts import load, make
from .zoo import BY_NAME, inputs, logits

NAMES = ("Mixtral", "Qwen 3 MoE, fused", "gpt-oss", "Llama 4")


def attach(model: Any, statistics: str = "both") -> Any:
    config = irq_convert.IecLoraConfig(r=0, statistics=statistics, task_type="CAUSAL_LM")
    return irq_convert.attach(model, config)


def moved(model: Any, seed: int = 0) -> Any:
    """`model` with statistics that have been moved at random."""
    adapted = attach(model).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_irq" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    kind = BY_NAME[name]
    artifact = make(kind, tmp_path)
    before = logits(load(artifact), kind)
    adapted = moved(load(artifact))
    wanted = logits(adapted, kind)
    assert float((wanted - before).abs().max()) > 0.1
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, kind), before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(artifact), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, kind), wanted)
    again.merge_adapter()
    assert float((logits(again, kind) - wanted).abs().max()) <= TOLERANCE
    again.unmerge_adapter()
    assert torch.equal(logits(again, kind), wanted)
    for to, options in (("irq", {"tau": TauDtype.FLOAT32}), ("dense", {})):
        merge(
            artifact, tmp_path / "adapter", tmp_path / to, MergeOptions(to=MergeTo(to), **options)
        )
    merged = load(tmp_path / "irq")
    assert float((logits(merged, kind) - wanted).abs().max()) <= TOLERANCE
    dense = dense_model(kind, tmp_path / "dense")
    assert float((logits(dense, kind) - wanted).abs().max()) <= TOLERANCE
    inside = adapted.merge_and_unload()
    inside.save_pretrained(tmp_path / "inside")
    kept, stored = read_tensors(artifact), read_tensors(tmp_path / "inside")
    for each in open_artifact(artifact).quantized:
        assert torch.equal(kept[each.name], stored[each.name])
    assert float((logits(load(tmp_path / "inside"), kind) - wanted).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_packed_is_trained_and_learns(name: str, tmp_path: Path) -> None:
    kind = BY_NAME[name]
    artifact = make(kind, tmp_path)
    adapted = attach(load(artifact))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    wanted = sum(t.shape.rows * t.shape.blocks_per_row for t in open_artifact(artifact).quantized)
    assert sum(p.numel() for p in trained) == 2 * wanted
    batch = inputs(kind)
    optimizer = torch.optim.SGD(trained, lr=0.02)
    loss = adapted(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in trained)
    optimizer.step()
    round_statistics(adapted, torch.float16)
    with torch.no_grad():
        assert float(adapted(**batch, labels=batch["input_ids"]).loss) < float(loss)


def test_gradients_by_differences(tmp_path: Path) -> None:
    """Of both moves of a stack in float64, through the class's own forward."""
    kind = BY_NAME["gpt-oss"]
    adapted = attach(irq_convert.load(make(kind, tmp_path), dtype=torch.float64))
    layer = next(m for m in adapted.modules() if isinstance(m, IecLoraExperts))
    stack = stacks(layer.get_base_layer())[0]
    parts = [part["default"] for part in (layer.lora_irq_scale, layer.lora_irq_tau)]
    for part in parts:
        part.double()
    batch = inputs(kind)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    for part in parts:
        parameter = part.get_parameter(stack)
        assert parameter.grad is not None
        at = int(parameter.grad.abs().argmax())
        found, step = float(parameter.grad.view(-1)[at]), 1e-2
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[at] = sign * step
                losses.append(float(adapted(**batch, labels=batch["input_ids"]).loss))
                parameter.view(-1)[at] = 0
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(found, rel=2e-2)


def test_a_stack_that_the_file_lacks(tmp_path: Path) -> None:
    kind = BY_NAME["Qwen 3 MoE, fused"]
    artifact = make(kind, tmp_path)
    moved(load(artifact)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    left = {n: t for n, t in tensors.items() if not ("layers.1" in n and "down_proj" in n)}
    assert len(left) == len(tensors) - 2
    save_file(left, file)
    with pytest.raises(IrqError, match=r"layers\.1\.mlp\.experts, but its file holds nothing"):
        merge(artifact, tmp_path / "adapter", tmp_path / "m", MergeOptions(to=MergeTo.IRQ))
    with pytest.raises(IrqError, match=r"lacks .*layers\.1\.mlp\.experts"):
        PeftModel.from_pretrained(load(artifact), tmp_path / "adapter")


def test_matrices_have_no_place_in_a_stack(tmp_path: Path) -> None:
    model = load(make(BY_NAME["Qwen 3 MoE, fused"], tmp_path))
    config = irq_convert.IecLoraConfig(r=2, target_modules=["experts"], task_type="CAUSAL_LM")
    with pytest.raises(UsageError, match="no place for matrices"):
        irq_convert.attach(model, config)


def test_two_adapters_of_a_stack(tmp_path: Path) -> None:
    kind = BY_NAME["Qwen 3 MoE, fused"]
    adapted = moved(load(make(kind, tmp_path)))
    one = logits(adapted, kind)
    every = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = irq_convert.IecLoraConfig(r=0, statistics="tau", **every)
    adapted.add_adapter("other", config)
    adapted.set_adapter("other")
    assert not torch.equal(logits(adapted, kind), one)  # 0 so far: the artifact itself
    layers = [m for m in adapted.modules() if isinstance(m, IecLoraExperts | IecLoraLinear)]
    experts = [m for m in layers if isinstance(m.get_base_layer(), IrqExperts)]
    assert experts
    for layer in layers:
        assert "other" in layer.lora_irq_tau
        assert "other" not in layer.lora_irq_scale
    adapted.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(adapted, kind), one)
    adapted.set_adapter("default")
    adapted.delete_adapter("other")
    assert torch.equal(logits(adapted, kind), one)
    assert all("other" not in layer.lora_irq_tau for layer in layers)


def test_an_adapter_for_each_row_of_a_batch(tmp_path: Path) -> None:
    """Rows may ask for adapters that add to the result; those that move a weight are for all."""
    kind = BY_NAME["Qwen 3 MoE, fused"]
    artifact = make(kind, tmp_path)
    base, adapted = load(artifact), moved(load(artifact))
    config = irq_convert.IecLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted.add_adapter("plain", config)
    for name, parameter in adapted.named_parameters():
        if "lora_B.plain" in name:
            torch.nn.init.normal_(parameter)
    batch = {name: values[:1].repeat(2, 1) for name, values in inputs(kind).items()}
    with torch.no_grad():
        found = adapted(**batch, adapter_names=["plain", "__base__"]).logits
        adapted.set_adapter("plain")
        for row, model in enumerate((adapted, base)):
            assert float((found[row] - model(**batch).logits[row]).abs().max()) <= TOLERANCE
        assert float((found[0] - found[1]).abs().max()) > 0.1
        with pytest.raises(UsageError, match="default trains statistics, which are the same for"):
            adapted(**batch, adapter_names=["plain", "default"])
