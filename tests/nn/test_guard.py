"""What can be done with `layer.weight`, and what is refused because it takes codes for weights."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from irq_convert.errors import UsageError
from irq_convert.nn.guard import PackedCodes
from irq_convert.nn.linear import IrqLinear
from tests.core.oracle import random_sample
from tests.folders import assert_one_line


def layer() -> IrqLinear:
    return IrqLinear.from_quantized(random_sample(7, 24, 64, "nf4", 32).q)


def multiply_in_place(weight: Any) -> None:
    weight *= 2


REFUSED: dict[str, Callable[[Any], Any]] = {
    "times": lambda w: w * 0.5,
    "times a tensor": lambda w: w * torch.ones(24, 1),
    "times a tensor of bytes": lambda w: torch.matmul(torch.ones(24, 24, dtype=torch.uint8), w),
    "plus": lambda w: w + torch.ones(24, 64),
    "turned": lambda w: torch.ones(24, 24) @ w.T,
    "linear": lambda w: functional.linear(torch.ones(2, 32), w),
    "a view": lambda w: w.view(-1)[3:].mul_(2),
    "its data": lambda w: w.data.add_(1),
    "a copy": lambda w: w.data.clone().add_(torch.ones(24, 64)),
    "in place": multiply_in_place,
    "an item": lambda w: w.__setitem__(0, 0),
    "zeros": lambda w: nn.init.zeros_(w),
    "noise": lambda w: nn.init.normal_(w),
    "copied over": lambda w: w.copy_(torch.ones(24, 64)),
    "other data": lambda w: setattr(w, "data", torch.ones(24, 64)),
    "a gradient": lambda w: w.requires_grad_(),
    "a flag": lambda w: setattr(w, "requires_grad", True),
    "a float": lambda w: w.float(),
    "a dtype": lambda w: w.to(torch.bfloat16),
    "a norm": lambda w: torch.linalg.norm(w),
    "out": lambda w: torch.mul(torch.ones(24, 32), 2, out=w),
    "a shape": lambda w: w.reshape(24, 64),
    "into a weight": lambda w: torch.ones(24, 32).copy_(w),
}


@pytest.mark.parametrize("what", REFUSED)
def test_codes_are_no_dense_weight(what: str) -> None:
    made = layer()
    before = copy.deepcopy(made.state_dict())
    with torch.no_grad(), pytest.raises(UsageError) as error:
        REFUSED[what](made.weight)
    assert_one_line(str(error.value), "[24, 64] in nf4 is packed", "irq-convert merge")
    for name, part in made.state_dict().items():
        assert type(part) is torch.Tensor
        assert part.dtype == before[name].dtype
        assert torch.equal(part, before[name])


def test_codes_can_be_looked_at_moved_and_copied() -> None:
    made = layer()
    plain = made.state_dict()["weight"]
    weight = made.weight
    assert isinstance(weight, nn.Parameter)
    assert weight is made.weight
    assert (weight.dtype, weight.shape, weight.device) == (plain.dtype, plain.shape, plain.device)
    assert weight.data_ptr() == plain.data_ptr()
    assert not weight.requires_grad
    assert not weight.requires_grad_(False).requires_grad
    assert torch.equal(weight, plain)
    assert torch.equal(weight.cpu().clone(), plain)
    assert (weight == plain).all()
    assert weight.to("meta").is_meta
    assert weight.numpy().sum() == plain.numpy().sum()
    assert torch.equal(weight[2:5], plain[2:5])
    assert torch.zeros_like(weight, dtype=torch.float32).sum() == 0
    assert torch.equal(pickle.loads(pickle.dumps(weight.data)), plain)
    file = io.BytesIO()
    torch.save({"weight": weight}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)["weight"], plain)


def test_codes_can_be_replaced_by_codes() -> None:
    made, other = layer(), layer()
    new = other.state_dict()["weight"].flip(0).contiguous()
    made.weight.data = new
    assert torch.equal(made.state_dict()["weight"], new)
    with torch.no_grad():
        made.weight.copy_(other.weight)
    assert torch.equal(made.state_dict()["weight"], other.state_dict()["weight"])
    made.weight = other.weight
    assert type(dict(made.named_parameters())["weight"]) is nn.Parameter
    assert made.state_dict()["weight"].data_ptr() == other.weight.data_ptr()


def test_a_mark_on_the_weight_is_on_the_parameter() -> None:
    made = layer()
    made.weight.of_mine = 3
    assert made._parameters["weight"].of_mine == 3
    made._parameters["weight"].of_theirs = 4
    assert made.weight.of_theirs == 4


def test_what_stands_for_codes_goes_where_they_go_and_with_them() -> None:
    made = layer()
    first = made.weight
    made.to_empty(device="meta")
    assert made.weight.is_meta
    made.to_empty(device="cpu")
    assert made.weight.data_ptr() == made.state_dict()["weight"].data_ptr()
    known = weakref.ref(made._parameters["weight"])
    del first, made
    gc.collect()
    assert known() is None


def test_a_layer_cannot_be_trained() -> None:
    made = layer()
    assert made.requires_grad_(False) is made
    with pytest.raises(UsageError, match="requires_grad_"):
        made.requires_grad_()


def test_copies_of_a_layer_are_guarded_and_equal() -> None:
    made = layer()
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(twin._parameters["weight"]) is nn.Parameter
        assert isinstance(twin.weight, PackedCodes)
        x = torch.randn(3, 64)
        assert torch.equal(twin(x), made(x))
        dense = functional.linear(x, made.dequantize())
        torch.testing.assert_close(made(x), dense, atol=1e-5, rtol=1e-5)
