"""`IrqLinear`: a linear layer whose `weight` parameter is the packed codes.

Its parameters carry the names of the file ("weight", "weight_scale", ...), so loading and saving
need no translation, and it is an `nn.Linear`, so that adapters find it. A program that takes the
weight for a dense one is refused instead of computing nonsense (`guard.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.blocks import BlockShape
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.parts import SUFFIXES, stored_parts
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import statistic_dtype
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn.function import packed_linear
from irq_convert.nn.guard import guarded_parameter, refusal, unguarded
from irq_convert.nn.parts import format_of, narrow_parts

PARTS = tuple(f"weight{suffix}" for suffix in SUFFIXES)


def named_parts(
    name: str, leading: tuple[int, ...], cols: int, fmt: ModuleFormat
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the parameters that hold `[*leading, cols]`, called `name` and a suffix.

    In the order of `SUFFIXES`, in which layers register them.
    """
    blocks = BlockShape(math.prod(leading), cols, fmt.block_size, fmt.bits)
    parts = stored_parts(blocks, leading, fmt.scale_dtype, fmt.tau_dtype)
    found = {suffix: parts[suffix] for suffix in SUFFIXES if suffix in parts}
    return {name + suffix: (part.shape, part.dtype.torch) for suffix, part in found.items()}


def layer_parts(
    rows: int, cols: int, fmt: ModuleFormat
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored part of a `[rows, cols]` matrix, by parameter name."""
    return named_parts("weight", (rows,), cols, fmt)


class IrqLinear(nn.Linear):
    """`y = x W^T + bias` with `W` stored packed; the input's dtype is the compute dtype.

    The packed parts never require gradients and keep their dtypes under `.to(dtype)`, `.half()`
    and the like; only `bias` follows.
    """

    weight_scale: nn.Parameter
    weight_tau: nn.Parameter
    weight_scale_grid: nn.Parameter | None
    weight_tau_grid: nn.Parameter | None

    # transformers would fill the parameters of a linear layer it takes for new with noise.
    _is_hf_initialized = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: ModuleFormat,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the parts of an `[out_features, in_features]` weight, all zero bytes.

        `dtype` is that of the bias, and of the weight should it ever be made dense. Raises
        `UsageError` when `fmt.columns` is not `in_features`.
        """
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.fmt = exact_columns(fmt, in_features)
        self.dense_dtype = dtype or torch.get_default_dtype()
        self.label = "the weight"
        parts = layer_parts(out_features, in_features, self.fmt)
        for name in PARTS:
            if name not in parts:
                self.register_parameter(name, None)
                continue
            shape, stored = parts[name]
            empty = torch.zeros(shape, dtype=stored, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: torch.Tensor | None = None) -> IrqLinear:
        """A layer over the tensors of `q` themselves (no copy); `bias` `[rows]` in any dtype."""
        q.check()
        scale, tau = (statistic_dtype(part.dtype).name for part in (q.scale, q.tau))
        fmt = ModuleFormat(q.codebook, q.block_size, scale, tau)
        layer = cls(q.cols, q.codes.shape[0], fmt, bias=False, device="meta")
        for suffix, tensor in q.parts().items():
            parameter = nn.Parameter(tensor.detach(), requires_grad=False)
            layer.register_parameter(f"weight{suffix}", parameter)
        if bias is not None:
            if bias.shape != (layer.out_features,):
                raise UsageError(
                    f"bias has shape {list(bias.shape)}, the weight {layer.out_features} rows"
                )
            layer.bias = nn.Parameter(bias.detach())
            layer.dense_dtype = bias.dtype
        return layer

    def reset_parameters(self) -> None:
        """Do nothing: packed codes have no random start."""

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The packed codes; whatever takes them for a dense weight is refused."""
        if "weight" not in self.__dict__.get("_parameters", ()):
            raise AttributeError("weight")
        return guarded_parameter(self._parameters["weight"], self._described())

    def _described(self) -> str:
        """The weight, for people."""
        shape = [self.out_features, self.in_features]
        return f"{self.label} {shape} in {self.fmt.codebook}"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, unguarded(value))

    def requires_grad_(self, requires_grad: bool = True) -> IrqLinear:
        """Freeze the layer; `UsageError` for training it, which packed codes cannot be."""
        if requires_grad:
            raise refusal(self._described(), "requires_grad_")
        super().requires_grad_(False)
        return self

    def packed_parts(self) -> dict[str, nn.Parameter]:
        """The packed parameters by name: codes, statistics and grids, without the bias."""
        found = {name: self._parameters.get(name) for name in PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that each of `packed_parts` has by its format."""
        parts = layer_parts(self.out_features, self.in_features, self.fmt)
        return {name: dtype for name, (_, dtype) in parts.items()}

    def quantized(self) -> QuantizedTensor:
        """The weight as a `QuantizedTensor` that shares the parameters' memory."""
        codes = self._parameters["weight"]
        assert codes is not None
        return QuantizedTensor(
            codes,
            self.weight_scale,
            self.weight_tau,
            self.weight_scale_grid,
            self.weight_tau_grid,
            self.in_features,
            self.fmt.codebook,
            self.fmt.block_size,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight, `[out_features, in_features]` in `dtype`."""
        return dequantize_tensor(self.quantized(), dtype)

    def forward(self, x: torch.Tensor, q: QuantizedTensor | None = None) -> torch.Tensor:
        """`x` floating `[..., in_features]` to `[..., out_features]` of the same dtype.

        `q` is the weight where it is not this layer's own, as with statistics that are trained.
        Under autocast both are in its dtype. Raises `IrqError` for an input that is not floating:
        some models cast activations to the dtype of `weight`, which is packed here.
        """
        x = autocast_input(x)
        if not x.is_floating_point():
            raise IrqError(
                f"a quantized layer got an input of {x.dtype}: the model seems to cast activations "
                "to the dtype of this layer's weight; convert it with this layer left dense"
            )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return packed_linear(x, self.quantized() if q is None else q, bias)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> IrqLinear:
        """Let `fn` move the packed parts but not change their dtypes."""
        keep = keep_dtypes(self.packed_parts().values(), fn)
        super()._apply(keep, recurse)
        self.dense_dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            narrow_parts(destination, prefix, self.part_dtypes())

    def stored_format(self) -> ModuleFormat:
        """The format of what a state dict holds: `fmt`, unless statistics were changed since."""
        return format_of(self.fmt, "weight", self.packed_parts(), self.part_dtypes())

    def bits_per_weight(self) -> float:
        """Stored bits of a weight, statistics and grids included."""
        stored = sum(part.numel() * part.element_size() for part in self.packed_parts().values())
        return 8 * stored / max(1, self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, codebook={self.fmt.codebook}, "
            f"block_size={self.fmt.block_size}, bits_per_weight={self.bits_per_weight():.3f}"
        )


def keep_dtypes(
    parts: Iterable[torch.Tensor], fn: Callable[..., torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`fn` as `Module._apply` takes it, moving `parts` without changing their dtypes."""
    packed = {id(part) for part in parts}

    def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        if id(tensor) in packed and moved.dtype != tensor.dtype:
            return tensor.to(moved.device)
        return moved

    return keep_dtype


def dense_layer(layer: IrqLinear, weight: nn.Parameter) -> nn.Module:
    """A dense layer for `layer` with `weight` `[out_features, in_features]` and its own bias.

    A `Conv1D`, which keeps its weight as `[in_features, out_features]`, where that is what the
    source has; its name would mean the transpose to a model that loads it again.
    """
    bias = layer.bias is not None
    dense: nn.Module
    if layer.fmt.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense = Conv1D(layer.out_features, layer.in_features)
        turned = weight.detach().T.contiguous()
        weight = nn.Parameter(turned, requires_grad=weight.requires_grad)
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
    dense.weight = weight
    if layer.bias is not None:
        dense.bias = layer.bias
    return dense.train(layer.training)


def statistics_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The floating packed parts of every layer of `model`: statistics and their grids.

    Whatever casts parameters to another dtype has to leave them alone, so under FSDP2 they are
    to be ignored: `fully_shard(layer, mp_policy=..., ignored_params=statistics_parameters(model))`.
    """
    parts = set()
    for module in model.modules():
        own = getattr(module, "packed_parts", None)
        parts |= {part for part in (own().values() if own else ()) if part.is_floating_point()}
    return parts


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """`x` in autocast's dtype where autocast would cast the input of a dense layer."""
    kind = x.device.type
    eligible = x.is_floating_point() and x.dtype != torch.float64 and kind != "meta"
    if eligible and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def exact_columns(fmt: ModuleFormat, in_features: int) -> ModuleFormat:
    """`fmt` with `columns` exactly where the packed width does not tell it."""
    if fmt.columns is not None and fmt.columns != in_features:
        raise UsageError(f"the format is of {fmt.columns} columns, the layer has {in_features}")
    row_bytes = BlockShape(1, in_features, fmt.block_size, fmt.bits).row_bytes
    implied = replace(fmt, columns=None).columns_of(row_bytes) == in_features
    return replace(fmt, columns=None if implied else in_features)
