"""Training an adapted artifact: with every kind of checkpointing, by hand and by Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import irq_convert
from irq_convert import prepare_for_training
from irq_convert.adapters.layer import IecLoraLinear

from .helpers import artifact, iec_config, packed_layers, tokens

KINDS: dict[str, dict[str, Any]] = {
    "both": {"lora_dropout": 0.1},
    "block": {"pool": "block"},
}
MODES: dict[str, Any] = {
    "none": False,
    "not reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return artifact(tmp_path / "base", bias=True)


def attached(base: Path, mode: Any = False, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = irq_convert.load(base)
    return irq_convert.attach(model, iec_config(**options), gradient_checkpointing=mode).train()


def steps(model: nn.Module, count: int = 4) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of `count` steps of AdamW from a fixed seed, and the parameters afterwards."""
    torch.manual_seed(1)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    losses = []
    for step in range(count):
        ids = tokens(seed=step % 2)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {n: p.detach() for n, p in trained.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_nothing(base: Path, kind: str) -> None:
    wanted, values = steps(attached(base, **KINDS[kind]))
    assert wanted[2] < wanted[0]
    assert wanted[3] < wanted[1]
    betas = [v for n, v in values.items() if n.endswith("lora_iec_beta.default.weight")]
    assert len(betas) == 14
    assert all((beta != 0).all() for beta in betas)
    for mode in ("not reentrant", "reentrant"):
        model = attached(base, MODES[mode], **KINDS[kind])
        assert model.get_base_model().is_activation_checkpointing
        losses, found = steps(model)
        assert losses == wanted, mode
        assert all(torch.equal(found[name], value) for name, value in values.items()), mode


def test_every_second_layer_checkpointed(base: Path) -> None:
    wanted, _ = steps(attached(base))
    model = attached(base)
    model.get_base_model().activation_checkpointing_enable(every_n_layers=2)
    assert steps(model)[0] == wanted


def test_activations_kept_elsewhere(base: Path) -> None:
    wanted, _ = steps(attached(base))
    model = attached(base)
    with torch.autograd.graph.save_on_cpu():
        assert steps(model)[0] == wanted


def test_plain_peft_after_our_preparation(base: Path) -> None:
    torch.manual_seed(0)
    model = irq_convert.load(base)
    prepared = prepare_for_training(model, gradient_checkpointing={"use_reentrant": True})
    assert prepared is model
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.config.use_cache
    found = get_peft_model(model, iec_config()).train()
    assert steps(found)[0] == steps(attached(base))[0]


def test_preparation_casts_nothing(base: Path) -> None:
    model = irq_convert.load(base, dtype=torch.bfloat16)
    kept = {n: p.dtype for n, p in model.named_parameters()}
    prepare_for_training(model)
    assert {n: p.dtype for n, p in model.named_parameters()} == kept
    assert model.config.use_cache
    assert not model.is_activation_checkpointing


def test_the_base_stays_as_it_is(base: Path) -> None:
    model = attached(base)
    kept = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    steps(model)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dense_is_saved_for_backward(base: Path, kind: str) -> None:
    """Besides its own small matrices and activations a layer keeps the packed parts alone."""
    model = attached(base, **KINDS[kind])
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    dense = {(m.out_features, m.in_features) for m in packed_layers(model).values()}
    dense |= {(cols, rows) for rows, cols in dense}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    ids = tokens(1, 4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids).loss.backward()
    pointers = {t.untyped_storage().data_ptr() for t in saved}
    codes = [m.weight.untyped_storage().data_ptr() for m in packed_layers(model).values()]
    assert len(pointers & set(codes)) == 11  # nothing before q, k, v of the first layer learns
    fresh = [t for t in saved if t.untyped_storage().data_ptr() not in owned]
    assert not [t.shape for t in fresh if tuple(t.shape) in dense]
    smallest = 4 * min(rows * cols for rows, cols in dense)
    assert max(t.untyped_storage().nbytes() for t in fresh) < smallest


def test_saved_bytes_of_a_wide_layer() -> None:
    from irq_convert.nn.linear import IrqLinear
    from tests.core.oracle import random_sample

    from .helpers import adapted

    base = IrqLinear.from_quantized(random_sample(0, 512, 1024).q)
    layer = adapted(base, r=4)
    assert isinstance(layer, IecLoraLinear)
    bytes_saved = 0
    seen = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal bytes_saved
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            bytes_saved += tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 1024, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum()
    packed = sum(p.nbytes for p in base.packed_parts().values())
    small = 4 * (4 * (512 + 1024) + 2 * 1024 + 2 * 4)  # A', B', x, x A^T
    assert packed <= bytes_saved <= packed + small + 64
    assert bytes_saved < 512 * 1024  # a quarter of the dense weight


@pytest.mark.parametrize("able", [True, False])
def test_a_dtype_that_this_cpu_is_no_good_at_is_named(
    base: Path, able: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(
        "irq_convert.adapters.attach.cpu_multiplies", lambda dtype: able or dtype == torch.float32
    )
    for dtype in (torch.float32, torch.bfloat16):
        irq_convert.attach(irq_convert.load(base, dtype=dtype), iec_config())
    said = [str(each.message) for each in recwarn if "no fast products" in str(each.message)]
    assert [text.split(" on ")[0] for text in said] == (
        [] if able else ["torch has no fast products of bfloat16"]
    )


@pytest.mark.parametrize("how", ["model", "autocast"])
def test_bfloat16(base: Path, how: str) -> None:
    torch.manual_seed(0)
    model = irq_convert.load(base, dtype=torch.bfloat16 if how == "model" else None)
    found = irq_convert.attach(model, iec_config(), gradient_checkpointing=True).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        losses, values = steps(found)
    assert losses[2] < losses[0]
    assert losses[3] < losses[1]
    assert all(v.dtype == torch.float32 for v in values.values())
    assert losses == pytest.approx(steps(attached(base))[0], rel=0.05)


# Trainer


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = tokens(1, 10, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    found = Trainer(model, TrainingArguments(**defaults | options), train_dataset=Rows())
    found.add_callback(Losses())
    return found


def losses_of(run: Trainer) -> list[float]:
    return next(c for c in run.callback_handler.callbacks if isinstance(c, Losses)).values


def test_trainer_with_every_kind_of_checkpointing(base: Path) -> None:
    wanted: list[float] = []
    for mode in ("none", "not reentrant", "reentrant"):
        options = (
            {}
            if mode == "none"
            else {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": MODES[mode]}
        )
        run = trainer(attached(base, lora_dropout=0.1), base.parent / "out", **options)
        run.train()
        found = losses_of(run)
        assert len(found) == 4
        wanted = wanted or found
        assert found == wanted, mode
    assert len(set(wanted)) == 4


def test_trainer_in_bfloat16(base: Path) -> None:
    run = trainer(attached(base), base.parent / "out", bf16=True)
    run.train()
    wanted = trainer(attached(base), base.parent / "out")
    wanted.train()
    assert losses_of(run) == pytest.approx(losses_of(wanted), rel=0.05)
    assert losses_of(run) != losses_of(wanted)


def adapter_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_trainer_resumes_where_it_stopped(base: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 4}
    whole = trainer(attached(base, lora_dropout=0.1), base.parent / "out", **options)
    whole.train()
    checkpoint = base.parent / "out" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert "model.safetensors" not in names
    resumed = trainer(attached(base, lora_dropout=0.1), base.parent / "again", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(resumed) == losses_of(whole)[2:]
    wanted = adapter_of(whole.model)
    for name, value in adapter_of(resumed.model).items():
        assert torch.equal(value, wanted[name]), name
    assert all((v != 0).any() for n, v in wanted.items() if "beta" in n)


def test_what_trainer_saves_is_an_adapter(base: Path) -> None:
    run = trainer(attached(base, pool="block"), base.parent / "out")
    run.train()
    run.save_model(str(base.parent / "adapter"))
    found = PeftModel.from_pretrained(irq_convert.load(base), base.parent / "adapter")
    wanted = adapter_of(run.model)
    assert {n: v.tolist() for n, v in adapter_of(found).items()} == {
        n: v.tolist() for n, v in wanted.items()
    }
