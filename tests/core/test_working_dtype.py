"""Products of 16-bit numbers where a CPU has no instructions for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from irq_convert.core import product, working_dtype
from irq_convert.core.product import tiled_product
from irq_convert.core.working_dtype import cpu_multiplies
from irq_convert.nn import function
from irq_convert.nn.function import packed_linear
from irq_convert.nn.statistics_grad import statistics_grad
from tests.core.oracle import random_sample

HALVES = [torch.bfloat16, torch.float16]
ROWS, COLS, TOKENS = 50, 300, 9


@pytest.fixture(params=HALVES, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype that this CPU is said to have no instructions for; tiles are small."""
    monkeypatch.setattr(working_dtype, "cpu_multiplies", lambda dtype: False)
    monkeypatch.setattr(product, "SMALL_TILE", 4096)
    monkeypatch.setattr(product, "LARGE_TILE", 4096)
    found: torch.dtype = request.param
    return found


def make(dtype: torch.dtype) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A packed matrix, its values rounded to `dtype` in float32, an input, a bias, a gradient."""
    sample = random_sample(5, ROWS, COLS, "nf3")
    dense = torch.from_numpy(sample.dense).to(dtype).float()
    torch.manual_seed(0)
    x, bias, grad = (
        torch.randn(*shape).to(dtype) for shape in ((TOKENS, COLS), (ROWS,), (TOKENS, ROWS))
    )
    return sample.q, dense, x, bias, grad


@pytest.mark.parametrize("autocast", [False, True])
def test_a_float32_product_is_rounded_once(dtype: torch.dtype, autocast: bool) -> None:
    q, dense, x, bias, grad = make(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = packed_linear(x, q, bias)
        y.backward(grad)
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    # One place, where the order of a float32 sum moves it across the middle of two numbers.
    near = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    exact = x.detach().double() @ dense.double().T + bias.double()
    torch.testing.assert_close(y, exact.to(dtype), **near)
    torch.testing.assert_close(x.grad, (grad.double() @ dense.double()).to(dtype), **near)
    same = (y == exact.to(dtype)).double().mean()
    assert same > 0.99


def test_torch_is_given_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    real = functional.linear

    def watched(x: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(x.dtype)
        return real(x, *others)

    monkeypatch.setattr(functional, "linear", watched)
    q, _, x, bias, _ = make(dtype)
    tiled_product(x, q, bias)
    assert set(seen) == {torch.float32}
    assert len(seen) > 2
    monkeypatch.setattr(working_dtype, "cpu_multiplies", lambda dtype: True)
    seen.clear()
    tiled_product(x, q, bias)
    assert set(seen) == {dtype}


@pytest.mark.parametrize("able", [False, True])
def test_a_gradient_is_taken_in_float32(
    dtype: torch.dtype, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_dtype, "cpu_multiplies", lambda dtype: able)
    seen: list[torch.dtype] = []
    real = function._tiled_grad

    def watched(grad: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(grad.dtype)
        return real(grad, *others)

    monkeypatch.setattr(function, "_tiled_grad", watched)
    q, _, x, _, grad = make(dtype)
    packed_linear(x.requires_grad_(), q).backward(grad)
    assert seen == [dtype if able else torch.float32]


def test_gradients_of_statistics(dtype: torch.dtype) -> None:
    q, _, x, _, grad = make(dtype)
    wanted = statistics_grad(grad.float(), x.float(), q, True, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = statistics_grad(grad, x, q, True, True)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_others_are_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_dtype, "cpu_multiplies", lambda dtype: False)
    for dtype in (torch.float32, torch.float64):
        assert working_dtype.working_dtype(torch.empty(1, dtype=dtype)) is dtype
    for dtype in HALVES:
        there = torch.empty(1, dtype=dtype, device="meta")
        assert working_dtype.working_dtype(there) is dtype
        assert working_dtype.working_dtype(torch.empty(1, dtype=dtype)) is torch.float32


def test_a_torch_without_onednn_is_no_good_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_dtype, "_ASKED", {torch.bfloat16: "_no_such_question"})
    assert not cpu_multiplies.__wrapped__(torch.bfloat16)
    assert cpu_multiplies.__wrapped__(torch.float32)
