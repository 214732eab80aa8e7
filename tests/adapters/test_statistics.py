"""Adapters of scale and tau: what a layer computes, its gradients, and what PEFT does with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

import irq_convert
from irq_convert import IecLoraConfig
from irq_convert.adapters.kinds import adapter_config
from irq_convert.adapters.layer import IecLoraLinear
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.artifact.adapter_statistics import SCALE, TAU
from irq_convert.core.codebook import CODEBOOKS, get_codebook
from irq_convert.core.moved import moved_statistics, with_statistics
from irq_convert.core.packing import unpack_codes
from irq_convert.core.scales import expand_statistic
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn import function, statistics_grad
from irq_convert.nn.linear import IrqLinear, dense_layer
from tests.core.oracle import random_sample

from .helpers import (
    adapted,
    adapted_model,
    artifact,
    assert_near,
    base_layer,
    iec_config,
    logits,
    packed_layers,
    randomize,
    tokens,
)

ALONE = {"r": 0, "statistics": "both"}


def dense_weight(layer: IecLoraLinear, names: tuple[str, ...] = ("default",)) -> torch.Tensor:
    """`level[code] s (1 + f) + t + s o`, written out in float64."""
    base = layer.get_base_layer()
    assert isinstance(base, IrqLinear)
    q = base.quantized()
    book = get_codebook(q.codebook)
    levels = torch.tensor(book.levels).double()[unpack_codes(q.codes, book.bits, q.cols).long()]
    scale = expand_statistic(q.scale, q.scale_grid).double()
    tau = expand_statistic(q.tau, q.tau_grid).double()
    factor, offset = torch.zeros_like(scale), torch.zeros_like(scale)
    for name in names:
        if name in layer.lora_irq_scale:
            factor += layer.lora_irq_scale[name].weight.double()
        if name in layer.lora_irq_tau:
            offset += layer.lora_irq_tau[name].weight.double()
    block = torch.arange(q.cols) // q.block_size
    return levels * (scale * (1 + factor))[:, block] + (tau + scale * offset)[:, block]


@pytest.mark.parametrize("statistics", ["both", "scale", "tau"])
@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("cols", [96, 100])  # 100: the last block is short
def test_forward(statistics: str, rank: int, cols: int) -> None:
    base, _ = base_layer("packed", cols=cols)
    layer = adapted(base, r=rank, statistics=statistics)
    assert ("default" in layer.lora_irq_scale) == (statistics != "tau")
    assert ("default" in layer.lora_irq_tau) == (statistics != "scale")
    x = torch.randn(2, 5, cols)
    weight = dense_weight(layer)
    if rank:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight = weight + layer.lora_variant["default"].delta(layer, "default").double()
        assert a.shape == (rank, cols)
        assert b.shape == (24, rank)
    wanted = functional.linear(x.double(), weight, base.bias.double())
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    delta = layer.get_delta_weight("default")
    found = functional.linear(x, base.dequantize() + delta, base.bias)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_untrained_it_changes_no_bit() -> None:
    base, _ = base_layer("packed")
    config = IecLoraConfig(**ALONE)
    layer = IecLoraLinear(base, "default", config=config, r=0, lora_alpha=8)
    x = torch.randn(3, 100)
    assert torch.equal(layer(x), base(x))
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in trained} - {"base_layer"} == {SCALE, TAU}


@pytest.mark.slow
@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
@pytest.mark.parametrize("cols", [64, 70])
def test_gradients_by_differences(codebook: str, cols: int) -> None:
    """The product is linear in both statistics, so wide steps keep float32's roundings small."""
    q = random_sample(7, 5, cols, codebook, 32).q
    shape = (5, q.shape.blocks_per_row)
    scale = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    tau = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, cols, dtype=torch.float64, requires_grad=True)

    def product(x: torch.Tensor, scale: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return function.packed_linear(x, with_statistics(q, scale.float(), tau.float()))

    assert torch.autograd.gradcheck(product, (x, scale, tau), eps=0.0625, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 90), st.sampled_from(sorted(CODEBOOKS)), st.booleans())
def test_gradients_in_tiles_are_those_of_a_dense_weight(
    rows: int, cols: int, codebook: str, traced: bool
) -> None:
    q = random_sample(rows + cols, rows, cols, codebook, 16).q
    torch.manual_seed(rows)
    x, grad = torch.randn(4, cols), torch.randn(4, rows)
    book = get_codebook(codebook)
    levels = torch.tensor(book.levels)[unpack_codes(q.codes, book.bits, cols).long()]
    whole = grad.T @ x
    blocks = q.shape.blocks_per_row
    of = functional.one_hot(torch.arange(cols) // 16, blocks).float()
    wanted = ((levels * whole) @ of, whole @ of)
    if traced:
        found = torch.ops.irq.statistics_grad(grad, x, q.codes, cols, codebook, 16, True, True)
    else:
        found = statistics_grad.statistics_grad(grad, x, q, True, True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_no_gradient_is_as_large_as_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_grad, "TILE", 4 * 100 * 4)
    made: list[int] = []
    q = random_sample(3, 24, 100, "nf3", 16).q
    empty = torch.Tensor.new_empty

    def counted(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        found = empty(self, *size, **options)
        made.append(found.numel())
        return found

    x, grad = torch.randn(4, 100), torch.randn(4, 24)
    whole = statistics_grad.statistics_grad(grad, x, q, True, True)
    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    with torch.no_grad():
        tiled = statistics_grad.statistics_grad(grad, x, q, True, True)
    assert made == [400, 400]
    for one, other in zip(tiled, whole, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_second_derivative() -> None:
    q = random_sample(3, 6, 40, "nf2", 16).q
    scale = torch.rand(6, 3, requires_grad=True)
    x = torch.randn(2, 40, requires_grad=True)
    y = function.packed_linear(x, with_statistics(q, scale, torch.zeros(6, 3)))
    (first,) = torch.autograd.grad(y.square().sum(), scale, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert bool(second.any())


def test_what_is_not_moved_is_not_rounded() -> None:
    q = random_sample(3, 6, 40, "nf2", 16).q
    scale, tau = (torch.rand(6, 3) for _ in range(2))
    q = with_statistics(q, scale, tau)
    move = [torch.full((6, 3), 0.01)]
    kept, moved = moved_statistics(q, [], move, torch.float16)
    assert torch.equal(kept, scale)
    assert torch.equal(moved, (tau + 0.01 * scale).half().float())
    moved, kept = moved_statistics(q, move, [], torch.float16)
    assert torch.equal(kept, tau)
    assert torch.equal(moved, (scale * 1.01).half().float())


@pytest.mark.parametrize("stored", ["uint8", "float16"])
def test_training_sees_what_will_be_stored(stored: str) -> None:
    layer = adapted(base_layer("packed")[0], **ALONE)
    x = torch.randn(3, 100)
    plain = layer(x)
    layer.rounded = getattr(torch, stored)
    rounded = layer(x)
    assert not torch.equal(plain, rounded)
    assert_near(rounded, plain, 0.05 if stored == "uint8" else 1e-2)
    rounded.sum().backward()
    assert bool(layer.lora_irq_tau["default"].weight.grad.any())
    layer.rounded = None
    layer.merge()
    merged = layer.base_layer
    assert isinstance(merged, IrqLinear)


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("pool", [None, "block"])
def test_merge_and_unmerge(rank: int, pool: str | None) -> None:
    if not rank and pool:
        return
    base, _ = base_layer("packed")
    layer = adapted(base, r=rank, statistics="both", pool=pool)
    x = torch.randn(3, 100)
    wanted, plain = layer(x), base(x)
    layer.merge()
    packed = isinstance(layer.base_layer, IrqLinear)
    assert packed == (not rank or pool is not None)
    if packed:
        assert torch.equal(layer.base_layer.quantized().codes, base.quantized().codes)
    assert_near(layer(x), wanted)
    layer.unmerge()
    assert layer.base_layer is base
    assert_near(layer(x), wanted)
    with torch.no_grad():
        layer.enable_adapters(False)
        assert torch.equal(layer(x), plain)


def test_two_adapters_add_up_in_any_order() -> None:
    base, _ = base_layer("packed")
    layer = adapted(base, **ALONE)
    config = IecLoraConfig(r=0, statistics="scale")
    layer.update_layer("other", 0, lora_alpha=8, config=config)
    randomize(layer, 5, "other", 0.1)
    x = torch.randn(3, 100)
    layer.set_adapter(["default", "other"])
    wanted = functional.linear(x.double(), dense_weight(layer, ("default", "other")))
    wanted = wanted + base.bias.double()
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
    once = copy.deepcopy(layer)
    once.merge()
    layer.merge(adapter_names=["other"])
    layer.merge(adapter_names=["default"])
    assert_near(layer(x), once(x), 1e-6)
    assert_near(layer(x).double(), wanted)


def test_a_scale_below_zero_is_not_merged() -> None:
    layer = adapted(base_layer("packed")[0], **ALONE)
    with torch.no_grad():
        layer.lora_irq_scale["default"].weight.fill_(-1.5)
    with pytest.raises(IrqError, match=r"driven a scale below 0"):
        layer.merge()
    beside = adapted(base_layer("packed")[0], **{**ALONE, "r": 4})
    with torch.no_grad():
        beside.lora_irq_scale["default"].weight.fill_(-1.5)
    with pytest.raises(IrqError, match=r"driven a scale below 0"):
        beside.merge()


@pytest.mark.parametrize("seed", [0])
def test_through_peft_and_back(tmp_path: Path, seed: int) -> None:
    """Saved, loaded by PEFT and by transformers, switched off, merged: the same logits."""
    folder = artifact(tmp_path / "a", bias=True)
    model = adapted_model(folder, **ALONE)
    wanted = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    assert not torch.equal(plain, wanted)
    model.save_pretrained(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(irq_convert.load(folder), tmp_path / "lora")
    assert torch.equal(logits(loaded), wanted)
    stock = irq_convert.load(folder)
    stock.load_adapter(str(tmp_path / "lora"))
    assert torch.equal(logits(stock), wanted)
    merged = loaded.merge_and_unload()
    assert packed_layers(merged)
    assert_near(logits(merged), wanted)


def test_all_linear_leaves_dense_layers_out(tmp_path: Path) -> None:
    model: Any = irq_convert.load(artifact(tmp_path / "a"))
    for layer in model.model.layers:
        packed = layer.mlp.down_proj
        layer.mlp.down_proj = dense_layer(packed, nn.Parameter(packed.dequantize()))
    with pytest.raises(UsageError, match="statistics of a dense layer"):
        get_peft_model(copy.deepcopy(model), iec_config(target_modules=["down_proj"], **ALONE))
    model = get_peft_model(model, iec_config(target_modules="all-linear", **ALONE))
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    assert named
    assert not any("down_proj" in name for name in named)


def test_it_learns(tmp_path: Path) -> None:
    model: Any = irq_convert.load(artifact(tmp_path / "a"))
    model = get_peft_model(model, iec_config(**ALONE))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r=0 is an adapter of nothing"),
        ({"r": 8, "statistics": "scales"}, "statistics 'scales': choose one of"),
        ({"r": 0, "statistics": "tau", "pool": "block"}, "leave pool and rank_pattern out"),
    ],
)
def test_refused_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        IecLoraConfig(**options)


def test_kinds() -> None:
    alone = adapter_config(AdapterKind.STATISTICS, r=64)
    assert isinstance(alone, IecLoraConfig)
    assert (alone.r, alone.statistics, alone.connection) == (0, "both", "none")
    beside = adapter_config(AdapterKind.PLAIN, r=8, statistics="tau")
    assert isinstance(beside, IecLoraConfig)
    assert (beside.r, beside.statistics, beside.connection) == (8, "tau", "none")


def test_one_weight_for_a_whole_batch() -> None:
    layer = adapted(base_layer("packed")[0], **ALONE)
    with pytest.raises(UsageError, match="the same for a whole batch"):
        layer(torch.randn(2, 100), adapter_names=["default", "__base__"])
