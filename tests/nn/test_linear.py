"""`IrqLinear`: values, gradients, memory, dtypes, copies and compilation, against dense layers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from irq_convert.artifact.config import ModuleFormat
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn.linear import IrqLinear
from irq_convert.nn.packed import PARTS
from tests.core.oracle import Sample, random_sample


def make(
    rows: int = 40, cols: int = 172, bias: bool = True, **options: Any
) -> tuple[IrqLinear, Sample]:
    sample = random_sample(rows + cols, rows, cols, **options)
    values = torch.randn(rows, generator=torch.Generator().manual_seed(0)) if bias else None
    return IrqLinear.from_quantized(sample.q, values), sample


def dense_of(layer: IrqLinear, sample: Sample, dtype: torch.dtype = torch.float32) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=dtype)
    dense.weight.data = torch.from_numpy(sample.dense).to(dtype)
    if layer.bias is not None:
        dense.bias.data = layer.bias.detach().to(dtype)
    return dense


@pytest.mark.parametrize("codebook", ["nf2", "nf3", "nf4", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (40,)])
def test_forward_is_the_dense_layer(
    codebook: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    layer, sample = make(codebook=codebook, bias=codebook != "nf3")
    x = torch.randn(*shape, 172).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, dense_of(layer, sample, dtype)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_go_tile_by_tile(dtype: torch.dtype) -> None:
    layer, sample = make(1500, 1028)
    for rows in (1, 16, 17):
        x = torch.randn(rows, 1028).to(dtype)
        torch.testing.assert_close(layer(x), dense_of(layer, sample, dtype)(x))
    assert layer(torch.randn(1028)).shape == (1500,)
    assert layer(torch.randn(0, 1028)).shape == (0, 1500)


def test_gradients_of_input_and_bias() -> None:
    layer, sample = make()
    dense = dense_of(layer, sample)
    x = torch.randn(4, 3, 172)
    xs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for module, own in ((layer, xs[0]), (dense, xs[1])):
        module(own).square().sum().backward()
    assert xs[0].grad is not None
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert all(part.grad is None for part in layer.packed_parts().values())


def test_gradcheck() -> None:
    layer, _ = make(6, 20, block_size=16)
    layer.bias = nn.Parameter(layer.bias.double())
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))

    def by_bias(bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"bias": bias}, (x.detach(),))

    assert torch.autograd.gradcheck(by_bias, (layer.bias,))


def test_only_packed_parts_are_saved_for_backward() -> None:
    layer, _ = make(256, 1024)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(64, 1024, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    owned = {part.data_ptr() for part in layer.packed_parts().values()}
    assert saved
    assert {tensor.data_ptr() for tensor in saved} <= owned
    y.sum().backward()


def test_no_gradient_where_none_is_asked_for() -> None:
    layer, _ = make(bias=False)
    assert not layer(torch.randn(2, 172)).requires_grad
    assert not any(part.requires_grad for part in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_keeps_the_packed_parts(dtype: torch.dtype) -> None:
    options = {"scale_dtype": "float32", "tau_dtype": "uint8"}
    layer, sample = make(**options)
    kept = {name: part.clone() for name, part in layer.packed_parts().items()}
    for cast in (
        lambda m: m.to(dtype),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(dtype),
        lambda m: m.to("cpu", dtype),
    ):
        parent = nn.Sequential(copy.deepcopy(layer))
        cast(parent)
        own = parent[0]
        assert isinstance(own, IrqLinear)
        assert own.bias.dtype != torch.float32
        for name, part in own.packed_parts().items():
            assert part.dtype == kept[name].dtype
            assert torch.equal(part, kept[name])
        assert torch.equal(own.dequantize(), torch.from_numpy(sample.dense))


def test_moving_to_meta_moves_everything() -> None:
    layer, _ = make()
    layer.to("meta")
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_autocast() -> None:
    layer, sample = make()
    x = torch.randn(5, 172, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        wanted = dense_of(layer, sample)(x)
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer.bias.grad.dtype == torch.float32


def test_integer_input_is_refused() -> None:
    layer, _ = make()
    with pytest.raises(IrqError, match=r"input of torch\.uint8.*left dense"):
        layer(torch.randn(2, 172).to(layer.weight.dtype))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "save"])
def test_copies(way: str) -> None:
    layer, sample = make(scale_dtype="float16")
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    elif way == "state_dict":
        twin = IrqLinear(172, 40, layer.fmt)
        assert not twin.dequantize().any()
        twin.load_state_dict(layer.state_dict())
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.fmt == layer.fmt
    assert torch.equal(twin.dequantize(), torch.from_numpy(sample.dense))
    assert torch.equal(twin.bias, layer.bias)
    assert not any(part.requires_grad for part in twin.packed_parts().values())
    x = torch.randn(2, 172)
    assert torch.equal(twin(x), layer(x))


def test_names_are_those_of_the_file() -> None:
    layer, _ = make()
    assert set(layer.state_dict()) == {*PARTS, "bias"}
    plain, _ = make(bias=False, scale_dtype="float32", tau_dtype="float16")
    assert set(plain.state_dict()) == {"weight", "weight_scale", "weight_tau"}
    assert isinstance(layer, nn.Linear)
    assert layer.weight.dtype == torch.uint8


def test_from_quantized_shares_memory_and_gives_it_back() -> None:
    layer, sample = make(7, 1023, codebook="nf3")
    q = layer.quantized()
    assert q.codes.data_ptr() == sample.q.codes.data_ptr()
    assert layer.fmt == ModuleFormat("nf3", 64, columns=1023 if 1023 * 3 % 8 >= 3 else None) or (
        layer.fmt.columns_of(q.codes.shape[1]) == 1023
    )
    assert torch.equal(layer.dequantize(), torch.from_numpy(sample.dense))


def test_columns_are_named_only_where_the_width_does_not_tell() -> None:
    assert IrqLinear(1024, 2, ModuleFormat("nf4", 64)).fmt.columns is None
    assert IrqLinear(1023, 2, ModuleFormat("nf4", 64)).fmt.columns == 1023
    with pytest.raises(UsageError, match="1022 columns, the layer has 1023"):
        IrqLinear(1023, 2, ModuleFormat("nf4", 64, columns=1022))


def test_bias_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(UsageError, match=r"bias has shape \[3\], the weight 4 rows"):
        IrqLinear.from_quantized(random_sample(0, 4, 64).q, torch.zeros(3))


def test_bias_and_input_of_different_dtypes() -> None:
    layer, sample = make()
    layer.to(torch.bfloat16)
    x = torch.randn(3, 172)
    wanted = functional.linear(x, torch.from_numpy(sample.dense), layer.bias.float())
    torch.testing.assert_close(layer(x), wanted)


def test_repr_says_how_it_is_stored() -> None:
    layer, _ = make(128, 1024, bias=False, codebook="nf3")
    # 3 bits, two bytes of statistics in 64 weights, 16 bytes of grids in 256 blocks
    assert layer.bits_per_weight() == pytest.approx(3 + 16 / 64 + 128 / (64 * 256))
    text = repr(layer)
    assert text == (
        "IrqLinear(in_features=1024, out_features=128, bias=False, codebook=nf3, "
        "block_size=64, bits_per_weight=3.258)"
    )


def test_reset_parameters_changes_nothing() -> None:
    layer, sample = make()
    layer.reset_parameters()
    assert torch.equal(layer.dequantize(), torch.from_numpy(sample.dense))
