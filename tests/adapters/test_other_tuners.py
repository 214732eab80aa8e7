"""Stock PEFT's tuners on packed layers: each merges never, says so in one line, and harms nothing.

What a model computes is compared with its dense twin: the same artifact exported, in transformers'
own code.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM

import irq_convert
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import assert_one_line, read_tensors
from tests.tiny import tiny_model

IDS = torch.arange(24).reshape(2, 12)
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 8},
    "SHIRA": {"r": 4},
    "WAVEFT": {"n_frequency": 64},
    "VBLORA": {"vector_length": 8},
    "C3A": {"block_size": 16},
    "ROAD": {"group_size": 16},
}
MERGING = (
    *("LORA", "ADALORA", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "MISS", "OFT", "PVERA"),
    *("RANDLORA", "ROAD", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
)
"""Tuners that train beside a packed layer, and would write into it when they merge."""
COMPUTING = ("DEFT", "DELORA", "FROD", "HIRA", "HRA", "OSF", "PEANUT", "SHIRA", "SUPERTUNING")
"""Tuners that need the dense weight to begin with, or in each forward."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuners")
    model = tiny_model(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model.save_pretrained(folder / "source")
    options = QuantizeOptions(QuantSpec("nf4", 32), threads=1)
    quantize(str(folder / "source"), folder / "artifact", options)
    irq_convert.export(folder / "artifact", folder / "dense", to="dense", dtype="float32")
    return folder / "artifact"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def dense_twin(artifact: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(artifact.with_name("dense"))


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all packed bytes, by names that no tuner changes."""
    found = {}
    for name, part in model.named_parameters():
        if part.dtype == torch.uint8:
            short = name.replace("base_model.model.", "").replace(".base_layer", "")
            found[short.replace(".original_module", "")] = part.detach().clone()
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def adapted(kind: str, artifact: Path, **more: Any) -> Any:
    """The artifact under a tuner of stock PEFT, whose numbers are moved a little."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]]
    given = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    known = inspect.signature(config.__init__).parameters
    given = {key: value for key, value in given.items() if key in known}
    model = get_peft_model(
        irq_convert.load(artifact), config(**given, **SETTINGS.get(kind, {}), **more)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MERGING)
def test_merging_is_refused_and_changes_nothing(kind: str, artifact: Path, tmp_path: Path) -> None:
    model = adapted(kind, artifact)
    before, wanted = codes(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UsageError) as error:
            merge()
        assert_one_line(
            str(error.value),
            "model.layers.0.self_attn.q_proj.weight [64, 64] in nf4 is packed",
            "irq-convert merge",
            "irq-convert export --to dense",
        )
        assert_same(codes(model), before)
        assert torch.equal(logits(model), wanted)
    base = model.unload()
    base.save_pretrained(tmp_path / "saved")
    after, stored = read_tensors(tmp_path / "saved"), read_tensors(artifact)
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[name], stored[name]) for name in stored)
    torch.testing.assert_close(logits(base), logits(dense_twin(artifact)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [*COMPUTING, "DORA"])
def test_tuners_that_need_the_dense_weight_are_refused(kind: str, artifact: Path) -> None:
    dora = {"use_dora": True} if kind == "DORA" else {}
    with pytest.raises(UsageError) as error:
        logits(adapted("LORA" if dora else kind, artifact, **dora))
    assert_one_line(str(error.value), "is packed", "[64, 64]", "irq-convert export --to dense")


FAILING: dict[str, tuple[str, dict[str, Any]]] = {
    "LoHa": ("LOHA", {}),
    "LoKr": ("LOKR", {}),
    "TinyLora": ("TINYLORA", {}),
    "LNTuning": ("LN_TUNING", {}),
    "Psoft": ("PSOFT", {}),
    "Lora": ("LORA", {"modules_to_save": ["o_proj"]}),
    "Lora, PiSSA": ("LORA", {"init_lora_weights": "pissa"}),
    "Lora, OLoRA": ("LORA", {"init_lora_weights": "olora"}),
}


@pytest.mark.parametrize("name", FAILING)
def test_tuners_that_cannot_be_put_on_packed_layers_say_so(name: str, artifact: Path) -> None:
    kind, options = FAILING[name]
    with pytest.raises(UsageError) as error:
        adapted(kind, artifact, **options)
    assert_one_line(str(error.value), name.split(",")[0], "packed", "irq-convert export --to dense")


def test_a_mistake_on_a_dense_model_stays_pefts(artifact: Path) -> None:
    dense = dense_twin(artifact)
    integers = torch.zeros(64, 64, dtype=torch.uint8)
    dense.model.layers[0].self_attn.q_proj.weight = nn.Parameter(integers, requires_grad=False)
    config = LoraConfig(target_modules=["k_proj"], modules_to_save=["q_proj"])
    with pytest.raises(RuntimeError, match="require gradients"):
        get_peft_model(dense, config)


def test_a_safe_merge_is_refused_too(artifact: Path) -> None:
    model = adapted("LORA", artifact)
    before = codes(model)
    with pytest.raises(UsageError, match="is packed"):
        model.merge_and_unload(safe_merge=True)
    assert_same(codes(model), before)


def test_stock_lora_computes_as_on_the_dense_twin(artifact: Path, tmp_path: Path) -> None:
    model = adapted("LORA", artifact)
    model.save_pretrained(tmp_path / "adapter")
    twin = PeftModel.from_pretrained(dense_twin(artifact), tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-5)
    irq_convert.merge(artifact, tmp_path / "adapter", tmp_path / "out", to="dense", any_base=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(twin), atol=1e-5, rtol=1e-5)


def test_what_is_ordinary_goes_on_working(artifact: Path, tmp_path: Path) -> None:
    model = irq_convert.load(artifact)
    wanted, before = logits(model), codes(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), wanted)
    prepared = prepare_model_for_kbit_training(copied)
    assert torch.equal(logits(prepared), wanted)
    moved = model.to("meta").to_empty(device="cpu")
    moved.load_state_dict(copied.state_dict())
    moved.model.rotary_emb = copied.model.rotary_emb  # a buffer that no state dict has
    assert_same(codes(moved), before)
    assert torch.equal(logits(moved), wanted)
    trained = get_peft_model(moved, LoraConfig(r=2, target_modules=["q_proj"]))
    loss = trained(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert_same(codes(trained), before)
