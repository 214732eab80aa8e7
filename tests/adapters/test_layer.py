"""One adapted layer, against the method page written out with dense matrices in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn import functional

from irq_convert import IecLoraConfig
from irq_convert.adapters.layer import IecLoraLinear
from irq_convert.errors import IrqError
from irq_convert.nn.linear import IrqLinear

from .helpers import BASES, adapted, base_layer, naive, randomize

CONNECTIONS = ("both", "input", "output", "none")


def options_of(kind: str, connection: str, pool: str | None) -> dict[str, Any]:
    block_size = 16 if pool and kind != "packed" else None
    return {"connection": connection, "pool": pool, "block_size": block_size}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("pool", [None, "block"])
@pytest.mark.parametrize("cols", [96, 100])  # 100: the last block is short
def test_forward(kind: str, connection: str, pool: str | None, cols: int) -> None:
    base, weight = base_layer(kind, cols=cols)
    block_size = 16 if pool else None
    for rank in (6, 8):  # 6 divides neither 100 nor 7 blocks
        layer = adapted(copy.deepcopy(base), r=rank, **options_of(kind, connection, pool))
        for shape in ((3,), (2, 5), (2, 1, 3)):
            x = torch.randn(*shape, cols)
            wanted = naive(layer, weight, x, connection, block_size)
            for training in (True, False):  # without dropout they are the same
                found = layer.train(training)(x)
                assert found.dtype == torch.float32
                torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(
    st.integers(1, 30), st.integers(1, 40), st.integers(1, 12), st.booleans(), st.integers(0, 99)
)
def test_any_rank_with_any_shape(rows: int, cols: int, rank: int, pooled: bool, seed: int) -> None:
    base, weight = base_layer("packed", rows, cols)
    layer = adapted(base, r=rank, pool="block" if pooled else None)
    randomize(layer, seed)
    x = torch.randn(4, cols)
    wanted = naive(layer, weight, x, "both", 16 if pooled else None)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(
        (x @ (weight + delta).T + base.bias).double(), wanted, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("pool", [None, "block"])
def test_dropout_hides_from_a_but_not_from_the_connection(
    kind: str, connection: str, pool: str | None
) -> None:
    base, weight = base_layer(kind)
    layer = adapted(base, lora_dropout=0.5, **options_of(kind, connection, pool)).train()
    x = torch.randn(2, 5, 100)
    block_size = 16 if pool else None
    torch.manual_seed(11)
    found = layer(x)
    torch.manual_seed(11)
    mask = functional.dropout(torch.ones(2, 5, 7 if pool else 100), 0.5).double()
    assert (mask == 0).any()
    wanted = naive(layer, weight, x, connection, block_size, mask)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    whole = naive(layer, weight, x, connection, block_size)
    torch.testing.assert_close(layer.eval()(x).double(), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.double(), whole)


def test_dropout_on_its_own_switch() -> None:
    """Dropout kept on while the model is evaluated: still hidden from A alone."""
    base, weight = base_layer("packed")
    layer = adapted(base, lora_dropout=0.5).eval()
    layer.lora_dropout["default"].train()
    x = torch.randn(3, 100)
    torch.manual_seed(11)
    found = layer(x)
    torch.manual_seed(11)
    mask = functional.dropout(torch.ones(3, 100), 0.5).double()
    torch.testing.assert_close(
        found.double(), naive(layer, weight, x, "both", None, mask), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_an_untrained_adapter_changes_nothing(connection: str) -> None:
    base, _ = base_layer("packed")
    config = IecLoraConfig(r=8, connection=connection)
    layer = IecLoraLinear(base, "default", config=config, r=8, lora_alpha=8)
    if connection == "none":
        assert "default" not in layer.lora_iec_beta
    else:
        beta = layer.lora_iec_beta["default"].weight
        assert beta.shape == (2,)
        assert not beta.any()
        assert beta.requires_grad
    x = torch.randn(3, 100)
    assert torch.equal(layer(x), base(x))


def test_betas_learn_from_zero() -> None:
    base, weight = base_layer("packed")
    base.requires_grad_(False)
    config = IecLoraConfig(r=8)
    layer = IecLoraLinear(base, "default", config=config, r=8, lora_alpha=8)
    x, target = torch.randn(16, 100), torch.randn(16, 24)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # B is 0 at first, so beta1 has a gradient from the second step on
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        grad = layer.lora_iec_beta["default"].weight.grad
        assert grad is not None
        assert grad[1] != 0
        optimizer.step()
    assert (grad != 0).all()
    assert (layer.lora_iec_beta["default"].weight != 0).all()
    torch.testing.assert_close(
        layer(x).double(), naive(layer, weight, x, "both", None), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("pool", [None, "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients(kind: str, connection: str, pool: str | None, dropout: float) -> None:
    base, weight = base_layer(kind)
    layer = adapted(base, r=6, lora_dropout=dropout, **options_of(kind, connection, pool)).train()
    x = torch.randn(3, 4, 100)
    block_size = 16 if pool else None
    torch.manual_seed(12)
    mask = functional.dropout(torch.ones(3, 4, 7 if pool else 100), dropout).double()
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert set(trained) == {"lora_A.default.weight", "lora_B.default.weight"} | (
        set() if connection == "none" else {"lora_iec_beta.default.weight"}
    )
    grads: list[dict[str, Any]] = []
    for ours in (True, False):
        own = x.clone().requires_grad_()
        layer.zero_grad()
        if ours:
            torch.manual_seed(12)
            y = layer(own).double()
        else:
            y = naive(layer, weight, own, connection, block_size, mask)
        y.square().sum().backward()
        grads.append({n: p.grad for n, p in trained.items()} | {"x": own.grad})
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-4, msg=name)
    if connection in ("input", "output"):
        unused = 1 if connection == "input" else 0
        assert grads[0]["lora_iec_beta.default.weight"][unused] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connection", "pool", "dropout"),
    [
        ("both", None, 0.0),
        ("both", "block", 0.0),
        ("both", None, 0.5),
        ("input", "block", 0.5),
        ("output", None, 0.5),
        ("none", None, 0.0),
    ],
)
def test_gradcheck(connection: str, pool: str | None, dropout: float) -> None:
    base, _ = base_layer("packed", rows=3, cols=18)
    layer = adapted(base, r=2, connection=connection, pool=pool, lora_dropout=dropout)
    layer.double().train()
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters() if p.requires_grad]

    def run(x: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(13)
        return torch.func.functional_call(layer, dict(zip(names, own, strict=True)), (x,))

    x = torch.randn(2, 18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))
    if pool is None:
        assert torch.autograd.gradgradcheck(run, (x, *values), fast_mode=True)


def test_scales() -> None:
    base, weight = base_layer("packed")
    for options, scaling in (({}, 12 / 8), ({"use_rslora": True}, 12 / 8**0.5)):
        layer = IecLoraLinear(
            base, "default", config=IecLoraConfig(r=8, **options), r=8, lora_alpha=12
        )
        assert layer.scaling["default"] == scaling
        if options:
            continue
        randomize(layer)
        x = torch.randn(2, 100)
        layer.scale_layer(3.0)
        found = layer(x)
        torch.testing.assert_close(
            found.double(), naive(layer, weight, x, "both", None), rtol=1e-5, atol=1e-5
        )
        layer.unscale_layer()
        assert layer.scaling["default"] == scaling


def test_connection_none_is_stock_lora() -> None:
    base, _ = base_layer("linear")
    ours = adapted(base, connection="none", lora_dropout=0.3)
    from peft import LoraConfig

    stock = LoraLinear(
        base, "default", config=LoraConfig(r=8, lora_dropout=0.3), r=8, lora_alpha=12
    )
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(4, 100)
    for training in (True, False):
        found = []
        for layer in (ours, stock):
            torch.manual_seed(5)
            found.append(layer.train(training)(x))
        torch.testing.assert_close(found[0], found[1])


def test_folding_without_dropout_is_one_product_more_than_plain_lora() -> None:
    """The connections cost nothing per token: nothing but the layer's output is as long as x."""
    base, _ = base_layer("packed")
    counts = []
    for connection in ("none", "both"):
        layer = adapted(base, connection=connection)
        saved: list[int] = []

        def keep(t: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(t.numel() if 50 in t.shape else 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(torch.randn(50, 100)).sum()
        counts.append(sum(saved))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("pool", [None, "block"])
def test_a_pooled_a_starts_as_wide_as_loras(pool: str | None) -> None:
    base, _ = base_layer("packed", 32, 1024)
    layer = IecLoraLinear(
        base, "default", config=IecLoraConfig(r=64, pool=pool), r=64, lora_alpha=64
    )
    a = layer.lora_A["default"].weight
    assert a.shape == (64, 64 if pool else 1024)
    bound = 1 / 1024**0.5
    assert a.abs().max() <= bound
    assert a.abs().max() > 0.95 * bound
    assert not layer.lora_B["default"].weight.any()
    assert a.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, "block"])
@pytest.mark.parametrize("connection", ["both", "none"])
def test_compiled(pool: str | None, connection: str) -> None:
    base, _ = base_layer("packed")
    layer = adapted(base, pool=pool, connection=connection)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 100)
    grads = []
    for run in (layer, compiled):
        layer.zero_grad()
        y = run(x)
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)])
    torch._dynamo.reset()
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("pool", [None, "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autocast(pool: str | None, dropout: float) -> None:
    base, weight = base_layer("packed")
    layer = adapted(base, pool=pool, lora_dropout=dropout).train()
    x = torch.randn(3, 100)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.manual_seed(2)
    mask = functional.dropout(torch.ones(3, 7 if pool else 100), dropout).double()
    wanted = naive(layer, weight, x, "both", 16 if pool else None, mask)
    torch.testing.assert_close(y.double(), wanted, rtol=0.05, atol=0.2)
    y.float().sum().backward()
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_input_with_a_float32_adapter(dtype: torch.dtype) -> None:
    base, weight = base_layer("packed")
    layer = adapted(base)
    x = torch.randn(3, 100).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    wanted = naive(layer, weight, x, "both", None)
    torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.05)


# Merging


def merged_as_before(layer: IecLoraLinear, x: torch.Tensor, **tolerance: float) -> torch.Tensor:
    before = layer(x)
    layer.merge()
    assert layer.merged
    after = layer(x)
    torch.testing.assert_close(after, before, **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))
    return before


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("connection", CONNECTIONS)
@pytest.mark.parametrize("pool", [None, "block"])
@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(kind: str, connection: str, pool: str | None, safe: bool) -> None:
    base, weight = base_layer(kind)
    kept = {name: t.clone() for name, t in base.state_dict().items()}
    layer = adapted(base, **options_of(kind, connection, pool)).eval()
    x = torch.randn(4, 100)
    before = layer(x)
    delta = layer.get_delta_weight("default")
    layer.merge(safe_merge=safe)
    assert layer.merged_adapters == ["default"]
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    now = layer.get_base_layer()
    dense = now.dequantize() if isinstance(now, IrqLinear) else now.weight
    wanted = (weight.T if kind == "conv1d" else weight) + delta
    torch.testing.assert_close(dense, wanted, rtol=1e-5, atol=1e-6)
    assert isinstance(now, IrqLinear) == (kind == "packed" and pool is not None)
    assert not any(p.requires_grad for p in now.parameters())
    layer.unmerge()
    assert not layer.merged
    back = layer.get_base_layer().state_dict()
    assert set(back) == set(kept)
    for name, tensor in back.items():
        if kind == "packed":
            assert layer.get_base_layer() is base
            assert torch.equal(tensor, kept[name]), name
        else:
            torch.testing.assert_close(tensor, kept[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codebook", ["nf2", "nf3", "nf4", "int3"])
@pytest.mark.parametrize("tau_dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("cols", [128, 172])
def test_a_pooled_merge_moves_tau_alone(codebook: str, tau_dtype: str, cols: int) -> None:
    from tests.core.oracle import random_sample

    sample = random_sample(1, 24, cols, codebook, 64, "uint8", tau_dtype)
    base = IrqLinear.from_quantized(sample.q)
    layer = adapted(base, pool="block").eval()
    before = merged_as_before(layer, torch.randn(4, cols))
    now = layer.get_base_layer()
    assert isinstance(now, IrqLinear)
    assert now.weight_tau.dtype == torch.float32
    assert now.weight_tau_grid is None
    assert now.fmt == replace(base.fmt, tau_dtype="float32")
    for name in ("weight", "weight_scale", "weight_scale_grid"):
        part = getattr(now, name)
        assert part.dtype == getattr(base, name).dtype
        assert torch.equal(part, getattr(base, name))
    assert before.shape == (4, 24)


def test_merge_of_two_adapters_and_of_one_after_the_other() -> None:
    base, _ = base_layer("packed")
    layer = adapted(base, pool="block").eval()
    for name, options in (("plain", {"connection": "none"}), ("other", {"pool": "block"})):
        layer.update_layer(name, 4, lora_alpha=4, config=IecLoraConfig(r=4, **options))
        randomize(layer, 1, name)
    x = torch.randn(4, 100)
    wanted = {}
    for names in (["default"], ["default", "other"], ["default", "plain"]):
        layer.set_adapter(names)
        wanted[tuple(names)] = layer(x)
    layer.set_adapter(["default", "plain", "other"])
    layer.merge(adapter_names=["default"])
    torch.testing.assert_close(layer(x), wanted["default",], rtol=1e-4, atol=1e-5)
    layer.merge(adapter_names=["other"])
    assert isinstance(layer.get_base_layer(), IrqLinear)
    torch.testing.assert_close(layer(x), wanted["default", "other"], rtol=1e-4, atol=1e-5)
    layer.unmerge()
    assert layer.get_base_layer() is base
    layer.merge(adapter_names=["default", "plain"])
    assert not isinstance(layer.get_base_layer(), IrqLinear)
    torch.testing.assert_close(layer(x), wanted["default", "plain"], rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="[Aa]lready"):
        layer.merge(adapter_names=["default"])
    layer.unmerge()
    assert layer.get_base_layer() is base
    layer.set_adapter(["plain"])
    layer.merge()
    layer.merge(adapter_names=["other"])  # pooled on what is dense by now
    layer.set_adapter(["plain", "other"])
    merged = layer(x)
    layer.unmerge()
    torch.testing.assert_close(merged, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", [None, "block"])
@pytest.mark.parametrize("safe", [False, True])
def test_a_broken_adapter_is_not_merged(pool: str | None, safe: bool) -> None:
    base, _ = base_layer("packed")
    layer = adapted(base, pool=pool)
    with torch.no_grad():
        layer.lora_iec_beta["default"].weight[1] = float("nan")
    with pytest.raises(IrqError, match="merging default gives NaN"):
        layer.merge(safe_merge=safe)
    assert layer.get_base_layer() is base
    assert not layer.merged


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_safe_merge_into_a_dense_layer(kind: str) -> None:
    base, _ = base_layer(kind)
    kept = base.weight.clone()
    layer = adapted(base)
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dense_merge_has_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    base, weight = base_layer("packed")
    base.to(dtype)
    layer = adapted(base)
    delta = layer.get_delta_weight("default")
    layer.merge()
    now = layer.get_base_layer()
    assert now.weight.dtype == dtype
    assert now.bias.dtype == dtype
    assert torch.equal(now.weight, (weight + delta).to(dtype))  # one rounding
    x = torch.randn(2, 100).to(dtype)
    assert layer(x).dtype == dtype


def test_a_pooled_merge_keeps_the_dtype_that_a_dense_weight_would_have() -> None:
    base, _ = base_layer("packed")
    base.to(torch.bfloat16)
    layer = adapted(base, pool="block")
    layer.merge()
    now = layer.get_base_layer()
    assert isinstance(now, IrqLinear)
    assert now.dense_dtype == torch.bfloat16
    assert now.bias.dtype == torch.bfloat16
    assert now.weight_tau.dtype == torch.float32


def test_unmerging_after_a_move() -> None:
    base, _ = base_layer("packed")
    layer = adapted(base)
    x = torch.randn(2, 100).double()
    before = layer(x.float())
    layer.merge()
    layer.double()
    layer.unmerge()
    base = layer.get_base_layer()
    assert base.dense_dtype == torch.float64
    assert base.bias.dtype == torch.float64
    assert base.weight.dtype == torch.uint8
    torch.testing.assert_close(layer(x), before.double(), rtol=1e-4, atol=1e-4)
    layer.merge()
    layer.to("meta")
    layer.unmerge()
    assert all(p.is_meta for p in layer.parameters())


def test_disabling_takes_a_merge_out_again() -> None:
    base, _ = base_layer("packed")
    layer = adapted(base).eval()
    x = torch.randn(2, 100)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    assert layer.get_base_layer() is base


def test_short_adapter_is_merged_in_float32() -> None:
    base, weight = base_layer("packed")
    layer = adapted(base)
    layer.lora_A.to(torch.bfloat16)
    layer.lora_B.to(torch.bfloat16)
    layer.lora_iec_beta.to(torch.bfloat16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    folded_a, folded_b = layer.lora_variant["default"].folded(layer, "default")
    assert folded_a.dtype == a.dtype == torch.bfloat16
    layer.merge()
    wanted = weight + (folded_b.float() @ folded_a.float()) * layer.scaling["default"]
    torch.testing.assert_close(layer.get_base_layer().weight, wanted)
    assert b.dtype == torch.bfloat16


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies(way: str) -> None:
    import pickle

    base, _ = base_layer("packed")
    layer = adapted(base).eval()
    twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, 100)
    assert torch.equal(twin(x), layer(x))
    twin.merge()
    twin.unmerge()
    assert torch.equal(twin(x), layer(x))


def test_repr_names_the_method() -> None:
    base, _ = base_layer("packed")
    text = repr(adapted(base))
    assert text.startswith("iec_lora.IecLoraLinear(")
    assert "lora_iec_beta" in text
    assert isinstance(base, nn.Module)
