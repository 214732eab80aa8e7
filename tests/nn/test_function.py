"""The packed product under compilers and tracers: same bits, same gradients."""

from __future__ import annotations

import pytest
import torch
from core.oracle import random_sample
from torch import nn
from torch.utils.checkpoint import checkpoint

from irq_convert.nn.function import packed_linear
from irq_convert.nn.linear import IrqLinear


def two_layers() -> nn.Sequential:
    first = IrqLinear.from_quantized(random_sample(1, 48, 100, "nf3").q, torch.randn(48))
    second = IrqLinear.from_quantized(random_sample(2, 24, 48, "int4", 16).q)
    return nn.Sequential(first, nn.GELU(), second)


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
    torch.library.opcheck(torch.ops.irq.dequantize.default, (*parts, torch.bfloat16))
    x, bias = torch.randn(3, 70), torch.randn(20)
    torch.library.opcheck(torch.ops.irq.linear.default, (x, bias, *parts))


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


def test_vector_input() -> None:
    sample = random_sample(4, 20, 70)
    x = torch.randn(70, requires_grad=True)
    packed_linear(x, sample.q).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.from_numpy(sample.dense).sum(0))
