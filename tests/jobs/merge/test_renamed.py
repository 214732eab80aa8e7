"""Adapters whose names are those of the base model or of an older class, and layers never called.

Results are compared with base plus adapter, on the artifact and on its dense twin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, LlavaForConditionalGeneration

import irq_convert
from irq_convert.errors import IrqError
from tests.architectures.journey import quantize_kind
from tests.architectures.zoo import LLAVA, Kind, inputs, logits, write_checkpoint
from tests.folders import assert_one_line, change_json, change_tensors, read_tensors
from tests.tiny import tiny_model

from .test_beside import KINDS, SIZES, artifact, outputs, train

WEIGHTS = "adapter_model.safetensors"
TARGETS: dict[str, Any] = {
    "ends": ["q_proj", "down_proj"],
    "an expression": r"layers\.\d\.self_attn\.[qv]_proj",
    "whole names": ["layers.0.self_attn.q_proj"],
    "all": "all-linear",
}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("causal"), tiny_model(**SIZES))


@pytest.mark.slow
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_trained_on_the_base_model(kind: str, targets: str, causal: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(causal)
    config = KINDS[kind](r=4, target_modules=TARGETS[targets])
    wanted = outputs(train(base, config, tmp_path / "adapter"))
    assert all(n.startswith("base_model.model.layers") for n in read_tensors(tmp_path / "adapter"))
    report = irq_convert.merge(
        causal, tmp_path / "adapter", tmp_path / "out", to="dense", any_base=True
    )
    assert report.logits.difference is not None
    merged = AutoModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(outputs(merged), wanted, atol=1e-5, rtol=1e-5)
    twin = AutoModel.from_pretrained(causal.with_name("twin"))
    irq_convert.merge(causal, tmp_path / "adapter", tmp_path / "f", to="adapter", any_base=True)
    folded = outputs(PeftModel.from_pretrained(twin, tmp_path / "f"))
    torch.testing.assert_close(folded, wanted, atol=1e-5, rtol=1e-5)


def test_a_target_of_the_base_model_that_is_missing(causal: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS["an expression"])
    train(AutoModel.from_pretrained(causal), config, tmp_path / "adapter")

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.self_attn.v_proj" in name]:
            del tensors[name]

    change_tensors(tmp_path / "adapter", drop, WEIGHTS)
    with pytest.raises(IrqError, match=r"names layers\.1\.self_attn\.v_proj"):
        irq_convert.merge(causal, tmp_path / "adapter", tmp_path / "o", to="dense", any_base=True)


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
PICTURES = Kind(
    "LLaVA on SigLIP",
    "LlavaForConditionalGeneration",
    "LlavaConfig",
    {**LLAVA, "vision_config": SIGLIP},
    vision=True,
    common=False,
)
POOL = "model.vision_tower.head.attention.out_proj"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with an `nn.MultiheadAttention` in its tower, and its dense twin."""
    folder = tmp_path_factory.mktemp("pictures")
    write_checkpoint(PICTURES, folder / "source")
    quantize_kind(PICTURES, folder / "source", folder / "art")
    irq_convert.export(folder / "art", folder / "twin", to="dense", dtype="float32")
    return folder / "art"


def stepped(model: Any, adapter: Path) -> torch.Tensor:
    """One step of training on text; returns logits and saves the adapter."""
    batch = inputs(PICTURES)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval().save_pretrained(adapter)
    return logits(model, PICTURES)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_an_older_class(kind: str, pictures: Path, tmp_path: Path) -> None:
    config = KINDS[kind](r=4, target_modules=r".*language_model.*\.q_proj")
    model = irq_convert.attach(irq_convert.load(pictures, dtype=torch.float32), config)
    wanted = stepped(model, tmp_path / "adapter")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            new = name.replace(".model.model.language_model.", ".model.language_model.model.")
            tensors[new] = tensors.pop(name)

    change_tensors(tmp_path / "adapter", rename, WEIGHTS)
    assert all(".language_model.model." in name for name in read_tensors(tmp_path / "adapter"))
    irq_convert.merge(pictures, tmp_path / "adapter", tmp_path / "out", to="dense", any_base=True)
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, PICTURES), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_layers_but_those_that_are_never_called(
    kind: str, pictures: Path, tmp_path: Path
) -> None:
    model = irq_convert.attach(irq_convert.load(pictures), KINDS[kind](r=2))
    assert not [n for n, _ in model.named_parameters() if POOL in n and "lora_" in n]
    wanted = stepped(model, tmp_path / "adapter")
    irq_convert.merge(pictures, tmp_path / "adapter", tmp_path / "out", to="dense", any_base=True)
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, PICTURES), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_learned_nothing_on_a_layer_never_called(
    kind: str, pictures: Path, tmp_path: Path
) -> None:
    """As adapters have it that were made when all linear layers took it in."""
    config = KINDS[kind](r=2, target_modules=["q_proj", "out_proj"])
    model = get_peft_model(irq_convert.load(pictures), config)
    wanted = stepped(model, tmp_path / "adapter")
    key = f"base_model.model.{POOL}.lora_B.weight"
    assert not read_tensors(tmp_path / "adapter")[key].any()
    irq_convert.merge(pictures, tmp_path / "adapter", tmp_path / "out", to="dense", any_base=True)
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, PICTURES), wanted, atol=1e-5, rtol=1e-5)
    before, after = read_tensors(pictures), read_tensors(tmp_path / "out")
    stored = next(n for n in before if n.endswith("head.attention.out_proj.weight"))
    assert torch.equal(after[stored], before[stored])
    change_tensors(tmp_path / "adapter", lambda tensors: tensors[key].add_(1), WEIGHTS)
    with pytest.raises(IrqError) as error:
        irq_convert.merge(pictures, tmp_path / "adapter", tmp_path / "n", to="dense", any_base=True)
    assert_one_line(str(error.value), POOL, "only linear layers and embeddings are merged")


@pytest.mark.parametrize("module", ["score", "classifier"])
def test_a_listed_module_that_the_model_does_not_have(
    module: str, causal: Path, tmp_path: Path
) -> None:
    """Only what PEFT lists of itself, for a task, may be missing."""
    train(irq_convert.load(causal), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "a")
    change_json(
        tmp_path / "a" / "adapter_config.json", lambda c: c.update(modules_to_save=[module])
    )
    with pytest.raises(IrqError, match=f"modules_to_save names {module}"):
        irq_convert.merge(causal, tmp_path / "a", tmp_path / "out", to="dense", any_base=True)
