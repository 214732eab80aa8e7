"""The product of two small matrices added to a layer's output: values, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from irq_convert.nn.lowrank import add_low_rank

SCALE = 0.7


def tensors(
    batch: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((*batch, 5), (*batch, 4), (3, 4), (5, 3))
    result, x, a, b = (torch.randn(*shape).to(dtype) for shape in shapes)
    return result, x, a, b


def plain(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = SCALE
) -> torch.Tensor:
    return result + scale * (x @ a.T) @ b.T


@pytest.mark.parametrize("batch", [(), (1,), (6,), (2, 3), (2, 1, 3), (0,), (2, 0)])
@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_values(batch: tuple[int, ...], scale: float) -> None:
    result, x, a, b = tensors(batch)
    wanted = plain(result, x, a, b, scale)
    torch.testing.assert_close(add_low_rank(result, x, a, b, scale), wanted)


@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (2, 1, 3)])
def test_gradients_are_those_of_the_plain_expression(batch: tuple[int, ...]) -> None:
    grads = []
    for function in (plain, add_low_rank):
        own = [t.requires_grad_() for t in tensors(batch)]
        function(own[0] * 1, *own[1:], SCALE).square().sum().backward()
        grads.append([t.grad for t in own])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("needed", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_each_gradient_alone(needed: tuple[int, ...]) -> None:
    grads = []
    for function in (plain, add_low_rank):
        own = [t.requires_grad_(bool(n)) for t, n in zip(tensors(), needed, strict=True)]
        function(own[0] * 1, *own[1:], SCALE).square().sum().backward()
        grads.append([t.grad for t in own])
    assert [g is not None for g in grads[1]] == [bool(n) for n in needed]
    torch.testing.assert_close(grads[1], grads[0])


def test_gradcheck() -> None:
    own = [t.requires_grad_() for t in tensors()]

    def function(result: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return add_low_rank(result * 1, *others, SCALE)  # type: ignore[call-arg]

    assert torch.autograd.gradcheck(function, own)
    assert torch.autograd.gradgradcheck(function, own)


def test_it_is_written_into_the_result() -> None:
    result, x, a, b = tensors()
    wanted = plain(result, x, a, b)
    found = add_low_rank(result, x, a, b, SCALE)
    assert found.data_ptr() == result.data_ptr()
    torch.testing.assert_close(result, wanted)
    again = [t.requires_grad_() for t in tensors()]
    output = functional.linear(torch.ones(2, 3, 4).double(), again[2].repeat(2, 1)[:5])
    assert add_low_rank(output, *again[1:], SCALE).data_ptr() == output.data_ptr()


LEFT_ALONE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "leaf": lambda t: t.requires_grad_(),
    "view": lambda t: torch.stack([t, t])[0],
    "view of a leaf": lambda t: t.requires_grad_().view(6, 5).view(2, 3, 5),
    "not contiguous": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda t: t[:1, :1].expand(2, 3, 5),
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_may_not_be_written_stays_untouched(kind: str) -> None:
    result, x, a, b = tensors()
    result = LEFT_ALONE[kind](result)
    kept = result.detach().clone()
    own = [t.requires_grad_() for t in (x, a, b)]
    found = add_low_rank(result, *own, SCALE)
    assert torch.equal(result.detach(), kept)
    torch.testing.assert_close(found, plain(kept, *own))
    found.sum().backward()
    assert all(t.grad is not None for t in own)


def test_the_input_itself_is_no_place_for_the_result() -> None:
    _, x, _, _ = tensors()
    a, b = torch.randn(3, 4).double().requires_grad_(), torch.randn(4, 3).double()
    kept = x.clone()
    found = add_low_rank(x, x, a, b, SCALE)
    torch.testing.assert_close(found, plain(kept, kept, a, b))
    found.sum().backward()
    (wanted,) = torch.autograd.grad(plain(kept, kept, a, b).sum(), a)
    torch.testing.assert_close(a.grad, wanted)


def test_one_after_the_other() -> None:
    """Several adapters on one output: each writes over what the one before wrote."""
    grads = []
    for function in (plain, add_low_rank):
        result, x, a, b = (t.requires_grad_() for t in tensors())
        once = function(result * 2, x, a, b, SCALE)
        function(once, x * x, a + 1, b - 1, 0.3).square().sum().backward()
        grads.append([t.grad for t in (result, x, a, b)])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes_go_the_plain_way(dtype: torch.dtype) -> None:
    result, x, a, b = tensors(dtype=torch.float32)
    short = result.to(dtype)
    kept = short.clone()
    found = add_low_rank(short, x, a, b, SCALE)
    assert found.dtype == torch.float32
    assert torch.equal(short, kept)
    torch.testing.assert_close(found, plain(kept.float(), x, a, b))


def test_one_short_dtype() -> None:
    found = add_low_rank(*tensors(dtype=torch.bfloat16), SCALE)
    assert found.dtype == torch.bfloat16
    wanted = plain(*(t.float() for t in tensors(dtype=torch.bfloat16)))
    torch.testing.assert_close(found.float(), wanted, rtol=0.03, atol=0.03)


def test_autocast() -> None:
    result, x, a, b = (t.requires_grad_() for t in tensors(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        output = functional.linear(x, torch.ones(5, 4))
        found = add_low_rank(output, x, a, b, SCALE)
    assert found.dtype == torch.bfloat16
    assert not result.grad
    wanted = plain(x @ torch.ones(4, 5), x, a, b)
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    found.sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    wanted.sum().backward()


def test_compiled() -> None:
    compiled = torch.compile(add_low_rank, backend="aot_eager", fullgraph=True)
    result, x, a, b = tensors()
    own = [t.requires_grad_() for t in (x, a, b)]
    found = compiled(result, *own, SCALE)
    torch.testing.assert_close(found, plain(result, *own))
    found.square().sum().backward()
    torch._dynamo.reset()
    assert all(t.grad is not None for t in own)


def test_no_gradients_are_kept_where_none_are_wanted() -> None:
    assert not add_low_rank(*tensors(), SCALE).requires_grad
    own = [t.requires_grad_() for t in tensors()[1:]]
    with torch.no_grad():
        assert not add_low_rank(tensors()[0], *own, SCALE).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(
            add_low_rank(tensors()[0], *own, SCALE), plain(*tensors()).detach()
        )
