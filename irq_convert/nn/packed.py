"""`PackedWeight`: what layers of a packed matrix have in common, whatever they compute with it.

The parameters carry the names of the file ("weight", "weight_scale", ...), so loading and saving
need no translation. A program that takes the weight for a dense one is refused instead of
computing nonsense (`guard.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.blocks import BlockShape
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.parts import SUFFIXES, stored_parts
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import statistic_dtype
from irq_convert.errors import UsageError
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


class PackedWeight(nn.Module):
    """A layer whose `weight` `[rows, cols]` is stored packed; `matrix_shape` is that of the weight.

    The packed parts never require gradients and keep their dtypes under `.to(dtype)`, `.half()`
    and the like. `dense_dtype` is that of the weight should it ever be made dense.
    """

    weight_scale: nn.Parameter
    weight_tau: nn.Parameter
    weight_scale_grid: nn.Parameter | None
    weight_tau_grid: nn.Parameter | None

    # transformers would fill the parameters of a layer it takes for new with noise.
    _is_hf_initialized = True

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        raise NotImplementedError

    def _allocate(
        self, fmt: ModuleFormat, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        """Register all parts, of zero bytes; `UsageError` when `fmt.columns` is not `cols`."""
        rows, cols = self.matrix_shape
        self.fmt = exact_columns(fmt, cols)
        self.dense_dtype = dtype or torch.get_default_dtype()
        self.label = "the weight"
        parts = layer_parts(rows, cols, self.fmt)
        for name in PARTS:
            if name not in parts:
                self.register_parameter(name, None)
                continue
            shape, stored = parts[name]
            empty = torch.zeros(shape, dtype=stored, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def _take(self, q: QuantizedTensor) -> Self:
        """Hold the tensors of `q` themselves."""
        for suffix, tensor in q.parts().items():
            parameter = nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(f"weight{suffix}", parameter)
        return self

    def reset_parameters(self) -> None:
        """Do nothing: packed codes have no random start."""

    @property
    def weight(self) -> Any:
        """The packed codes; whatever takes them for a dense weight is refused."""
        if "weight" not in self.__dict__.get("_parameters", ()):
            raise AttributeError("weight")
        return guarded_parameter(self._parameters["weight"], self._described())

    def _described(self) -> str:
        """The weight, for people."""
        return f"{self.label} {list(self.matrix_shape)} in {self.fmt.codebook}"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, unguarded(value))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
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
        parts = layer_parts(*self.matrix_shape, self.fmt)
        return {name: dtype for name, (_, dtype) in parts.items()}

    def quantized(self) -> QuantizedTensor:
        """The weight as a `QuantizedTensor` that shares the parameters' memory."""
        # Asked once a token: the same object as long as the parameters are.
        parts = tuple(map(self._parameters.__getitem__, PARTS))
        known: QuantizedTensor | None = self.__dict__.get("_quantized")
        if known is not None and all(map(operator.is_, parts, _parts(known))):
            return known
        assert parts[0] is not None
        fmt, cols = self.fmt, self.matrix_shape[1]
        given: Any = (*parts, cols, fmt.codebook, fmt.block_size)
        found = QuantizedTensor(*given)
        self.__dict__["_quantized"] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: parameters once, not again in what was made of them."""
        return {name: value for name, value in self.__dict__.items() if name != "_quantized"}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense weight, `matrix_shape` in `dtype`."""
        return dequantize_tensor(self.quantized(), dtype)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Self:
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
        return 8 * stored / max(1, math.prod(self.matrix_shape))


def _parts(q: QuantizedTensor) -> tuple[torch.Tensor | None, ...]:
    return q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid


def format_of_tensor(q: QuantizedTensor) -> ModuleFormat:
    """How `q` is stored, by its parts; raises `IrqError` where they do not fit together."""
    q.check()
    scale, tau = (statistic_dtype(part.dtype).name for part in (q.scale, q.tau))
    return ModuleFormat(q.codebook, q.block_size, scale, tau)


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


def exact_columns(fmt: ModuleFormat, in_features: int) -> ModuleFormat:
    """`fmt` with `columns` exactly where the packed width does not tell it."""
    if fmt.columns is not None and fmt.columns != in_features:
        raise UsageError(f"the format is of {fmt.columns} columns, the layer has {in_features}")
    row_bytes = BlockShape(1, in_features, fmt.block_size, fmt.bits).row_bytes
    implied = replace(fmt, columns=None).columns_of(row_bytes) == in_features
    return replace(fmt, columns=None if implied else in_features)
