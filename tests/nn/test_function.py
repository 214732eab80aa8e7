"""The packed product: its tiles, and under compilers and tracers the same bits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from irq_convert.core import product
from irq_convert.core.decode import MOST_TOKENS, decodes, packed_product
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.nn import function
from irq_convert.nn.function import packed_linear
from irq_convert.nn.linear import IrqLinear
from tests.core.oracle import random_sample


def two_layers() -> nn.Sequential:
    first = IrqLinear.from_quantized(random_sample(1, 48, 100, "nf3").q, torch.randn(48))
    second = IrqLinear.from_quantized(random_sample(2, 24, 48, "int4", 16).q)
    return nn.Sequential(first, nn.GELU(), second)


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_forward_and_backward(fullgraph: bool) -> None:
    torch.manual_seed(0)
    model = two_layers()
    x = torch.randn(5, 100)
    results = []
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    for run in (model, compiled):
        own = x.clone().requires_grad_()
        model.zero_grad()
        y = run(own)
        y.square().sum().backward()
        results.append((y.detach(), own.grad, model[0].bias.grad.clone()))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other)
    torch._dynamo.reset()


def test_operators_keep_their_contract() -> None:
    q = random_sample(3, 20, 70).q
    parts = (q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid, q.cols, q.codebook, q.block_size)
    x, bias, grad = torch.randn(3, 70), torch.randn(20), torch.randn(3, 20)
    torch.library.opcheck(torch.ops.irq.product.default, (x, bias, *parts))
    torch.library.opcheck(torch.ops.irq.linear.default, (x, bias, *parts))
    torch.library.opcheck(torch.ops.irq.linear_grad.default, (grad, *parts))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = two_layers()
    x = torch.randn(5, 100)
    grads = []
    for recompute in (False, True):
        own = x.clone().requires_grad_()
        y = checkpoint(model, own, use_reentrant=reentrant) if recompute else model(own)
        assert isinstance(y, torch.Tensor)
        y.square().sum().backward()
        grads.append(own.grad)
    assert grads[0] is not None
    assert torch.equal(grads[0], grads[1])


def test_a_few_inputs_of_a_model_that_is_not_trained_meet_packed_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled or not: the bits of `packed_product`; where it is trained those of dense tiles."""
    model, x = two_layers().eval(), torch.randn(3, 100)
    with torch.no_grad():
        wanted = model(x)
    trained = model(x)
    torch.testing.assert_close(wanted, trained)
    sizes = small_tiles(monkeypatch, 1 << 20)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), wanted)
        torch._dynamo.reset()
        first = model[0]
        assert isinstance(first, IrqLinear)
        assert torch.equal(first(x), packed_product(x, first.quantized(), first.bias))
    if decodes(x, model[0].quantized()):
        assert not sizes
    assert torch.equal(model(x), trained)
    assert len(sizes) == 2
    with torch.no_grad():
        model(torch.randn(MOST_TOKENS[x.dtype] + 1, 100))
        assert len(sizes) == 4
        assert torch.equal(model.train()(x), trained)


def test_vector_input() -> None:
    sample = random_sample(4, 20, 70)
    x = torch.randn(70, requires_grad=True)
    packed_linear(x, sample.q).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.from_numpy(sample.dense).sum(0))


def small_tiles(monkeypatch: pytest.MonkeyPatch, tile_bytes: int) -> list[int]:
    """Let tiles hold `tile_bytes`; what is returned collects the weights of every tile."""
    monkeypatch.setattr(product, "SMALL_TILE", tile_bytes)
    monkeypatch.setattr(product, "LARGE_TILE", tile_bytes)
    sizes: list[int] = []
    both = ((product, "dequantize_rows"), (product, "dequantize_tensor"))
    for module, name in (*both, (function, "dequantize_tensor")):
        real = getattr(module, name)

        def counted(*args: Any, real: Any = real, **options: Any) -> torch.Tensor:
            dense = real(*args, **options)
            assert isinstance(dense, torch.Tensor)
            sizes.append(dense.numel() * dense.element_size())
            return dense

        monkeypatch.setattr(module, name, counted)
    return sizes


UNIT = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half the distance between neighbours of a short dtype, relative to their size."""


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize(
    ("codebook", "rows", "cols", "block_size"),
    [("nf4", 50, 300, 64), ("nf3", 37, 172, 16), ("int2", 7, 512, 32), ("nf4", 1, 1000, 64)],
)
@pytest.mark.parametrize("statistic", ["uint8", "float16", "float32"])
def test_tiles_are_the_dense_products(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    codebook: str,
    rows: int,
    cols: int,
    block_size: int,
    statistic: str,
) -> None:
    """Tiles that divide neither rows nor columns, both ways, against a product in float64."""
    sample = random_sample(5, rows, cols, codebook, block_size, statistic, statistic)
    tile_bytes = 3 * cols * dtype.itemsize
    sizes = small_tiles(monkeypatch, tile_bytes)
    torch.manual_seed(0)
    x = torch.randn(2, 9, cols).to(dtype).requires_grad_()
    y = packed_linear(x, sample.q)
    grad = torch.randn(2, 9, rows).to(dtype)
    y.backward(grad)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert max(sizes) <= max(tile_bytes, rows * block_size * dtype.itemsize)
    assert len(sizes) > 2 or rows == 1
    dense = torch.from_numpy(sample.dense).to(dtype).double()
    for found, left, right in ((x.grad, grad, dense), (y, x.detach(), dense.T)):
        exact = left.double() @ right
        # what the sum loses, and one rounding, which of tiny float16 numbers is absolute
        of_sum = 1e-14 if dtype == torch.float64 else 1e-6
        slack = of_sum * (left.double().abs() @ right.abs()) + UNIT[dtype] * exact.abs()
        slack += 2.0**-25 if dtype == torch.float16 else 0.0
        assert bool(((found.double() - exact).abs() <= slack).all())


@pytest.mark.parametrize("shape", [(300,), (0, 300), (1, 300), (2, 0, 300), (2, 3, 300)])
def test_tiles_take_any_shape(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    sample = random_sample(6, 50, 300)
    small_tiles(monkeypatch, 4096)
    x = torch.randn(shape, requires_grad=True)
    y = packed_linear(x, sample.q, torch.zeros(50))
    y.sum().backward()
    assert y.shape == (*shape[:-1], 50)
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad, torch.from_numpy(sample.dense).sum(0).expand(shape), rtol=1e-4, atol=1e-5
    )


def test_gradient_that_is_not_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = random_sample(7, 50, 300)
    small_tiles(monkeypatch, 4096)
    x = torch.randn(4, 3, 300, requires_grad=True)
    grad = torch.randn(50, 3, 4).permute(2, 1, 0)
    packed_linear(x, sample.q).backward(grad)
    torch.testing.assert_close(x.grad, grad @ torch.from_numpy(sample.dense))


def test_tiles_under_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = random_sample(8, 6, 20, block_size=16)
    small_tiles(monkeypatch, 512)
    x = torch.randn(2, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda own: packed_linear(own, sample.q), (x,))
    assert torch.autograd.gradgradcheck(lambda own: packed_linear(own, sample.q), (x,))


def test_storages_can_be_resized_afterwards() -> None:
    """FSDP2 frees a gathered parameter by resizing its storage to nothing."""
    q = random_sample(9, 12, 70).q
    x = torch.randn(2, 70, requires_grad=True)
    parts = {suffix: part.clone() for suffix, part in q.parts().items()}
    own = QuantizedTensor(
        *(parts[s] for s in ("", "_scale", "_tau", "_scale_grid", "_tau_grid")), 70, "nf4", 64
    )
    packed_linear(x, own).sum().backward()
    for part in parts.values():
        part.untyped_storage().resize_(0)
