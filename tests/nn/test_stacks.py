"""Stand-ins for the weights of experts: they multiply, and refuse everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional

from irq_convert.errors import IrqError
from irq_convert.nn.stacks import ExpertMatrix, ExpertStack

EXPERTS, OUT, IN = 3, 6, 5
WEIGHT = torch.arange(EXPERTS * OUT * IN).reshape(EXPERTS, OUT, IN).float()


def stack(transposed: bool, cuts: int = 1) -> ExpertStack:
    """`WEIGHT`, each expert cut into `cuts` parts."""

    def expert(number: int) -> list[Any]:
        return [partial(functional.linear, weight=part) for part in WEIGHT[number].chunk(cuts)]

    pair = (IN, OUT) if transposed else (OUT, IN)
    return ExpertStack(expert, (EXPERTS, *pair), transposed, torch.empty(0))


@pytest.mark.parametrize("cuts", [1, 2])
@pytest.mark.parametrize("index", [1, -1, torch.tensor(2), torch.tensor([0])])
def test_linear_and_matmul(index: Any, cuts: int) -> None:
    x, bias = torch.randn(4, IN), torch.randn(OUT)
    dense = WEIGHT[int(index)]
    straight, turned = stack(False, cuts)[index], stack(True, cuts)[index]
    wanted = functional.linear(x, dense)
    assert torch.allclose(functional.linear(x, straight), wanted, atol=1e-3)  # type: ignore[arg-type]
    assert torch.allclose(functional.linear(x, straight, bias), wanted + bias, atol=1e-3)  # type: ignore[arg-type]
    assert torch.allclose(functional.linear(x, turned.T, bias=bias), wanted + bias, atol=1e-3)  # type: ignore[arg-type]
    for product in (x @ turned, torch.matmul(x, turned), torch.mm(x, turned), x @ straight.t()):  # type: ignore[operator,call-overload]
        assert torch.allclose(product, wanted, atol=1e-3)
    assert torch.allclose(x @ straight.transpose(-1, 0), wanted, atol=1e-3)  # type: ignore[operator]


def test_all_experts_at_once() -> None:
    x = torch.randn(EXPERTS, 4, IN)
    assert torch.allclose(torch.bmm(x, stack(True)), torch.bmm(x, WEIGHT.mT), atol=1e-3)  # type: ignore[arg-type]
    assert torch.allclose(x @ stack(True), x @ WEIGHT.mT, atol=1e-3)  # type: ignore[operator]


def test_looks_like_the_tensor() -> None:
    found = stack(True)
    assert (found.shape, found.size(0), len(found)) == ((EXPERTS, IN, OUT), EXPERTS, EXPERTS)
    assert (found.dtype, found.device) == (torch.float32, torch.device("cpu"))


X = torch.randn(4, IN)
REFUSED: list[Callable[[], Any]] = [
    lambda: functional.linear(X, stack(True)[0]),  # type: ignore[arg-type]
    lambda: X @ stack(False)[0],  # type: ignore[operator]
    lambda: torch.add(X, stack(False)[0]),  # type: ignore[arg-type]
    lambda: functional.linear(stack(False)[0], X),  # type: ignore[arg-type]
    lambda: torch.bmm(X[None], stack(False)),  # type: ignore[arg-type]
    lambda: torch.bmm(X[None], stack(True)),  # type: ignore[arg-type]
    lambda: torch.stack([stack(True)]),  # type: ignore[list-item]
    lambda: stack(True)[torch.tensor([0, 1])],
    lambda: stack(True)[0].transpose(0, 2),
    lambda: functional.silu(stack(True)[0]),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("use", REFUSED)
def test_everything_else_is_an_error(use: Callable[[], Any]) -> None:
    with pytest.raises(IrqError, match="--keep experts"):
        use()


def test_no_such_expert() -> None:
    with pytest.raises(IndexError, match="expert 3 of 3"):
        stack(True)[3]
    assert isinstance(stack(True)[2], ExpertMatrix)
