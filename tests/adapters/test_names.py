"""The names of an adapter's parameters, by which other libraries find, copy and group them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from safetensors.torch import load_file

import irq_convert
from tests.adapters.helpers import adapted_model, artifact, iec_config, logits, randomize


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return artifact(tmp_path / "base")


def copy_reference(model: PeftModel) -> None:
    """What TRL's trainers of preferences do for a model that comes with an adapter."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def test_every_parameter_names_its_adapter_in_the_middle(base: Path) -> None:
    model = adapted_model(base)
    found = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert len(found) == 2 * 7 * 3
    assert all(".default." in name for name in found)


@pytest.mark.parametrize("pool", [None, "block"])
def test_a_reference_copied_by_name_computes_the_same(base: Path, pool: str | None) -> None:
    model = adapted_model(base, pool=pool)
    wanted = logits(model)
    copy_reference(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), wanted)
    model.set_adapter("default")
    randomize(model, 5, size=0.05)
    model.set_adapter("ref")
    assert torch.equal(logits(model), wanted)


def test_files_have_betas_under_their_old_name(base: Path, tmp_path: Path) -> None:
    model = adapted_model(base)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    betas = {n: t for n, t in stored.items() if "beta" in n}
    assert len(betas) == 14
    assert all(n.endswith("_proj.lora_iec_beta") and t.shape == (2,) for n, t in betas.items())
    found = PeftModel.from_pretrained(irq_convert.load(base), tmp_path / "adapter", "other")
    assert torch.equal(logits(found), logits(model))


def test_an_adapter_called_weight_keeps_its_betas(base: Path, tmp_path: Path) -> None:
    model = adapted_model(base)
    model.save_pretrained(tmp_path / "adapter")
    found = PeftModel.from_pretrained(irq_convert.load(base), tmp_path / "adapter", "weight")
    assert torch.equal(logits(found), logits(model))
    kept = get_peft_model_state_dict(found, adapter_name="weight")
    assert kept.keys() == load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()


def test_one_adapter_is_swapped_for_another(base: Path) -> None:
    one, other = adapted_model(base), adapted_model(base, seed=3)
    wanted = logits(other)
    assert not torch.allclose(logits(one), wanted)
    state = {n: p.detach().clone() for n, p in other.named_parameters() if "lora_" in n}
    hotswap_adapter_from_state_dict(one, state, "default", iec_config())
    assert torch.equal(logits(one), wanted)


def test_loraplus_groups_every_parameter(base: Path) -> None:
    model = adapted_model(base)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert set(grouped) == trained
    assert len(grouped) == len(trained)


def test_switching_an_adapter_off_freezes_its_betas(base: Path) -> None:
    model = adapted_model(base)
    copy_reference(model)
    model.set_adapter("ref")
    assert not [n for n, p in model.named_parameters() if ".default." in n and p.requires_grad]
    model.delete_adapter("ref")
    assert not [n for n, _ in model.named_parameters() if ".ref" in n]
