"""`IrqLinear`: a linear layer whose `weight` parameter is the packed codes.

It is an `nn.Linear`, so that adapters find it; how the weight is held is in `packed.py`.
"""

from __future__ import annotations

import torch
from torch import nn

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import IrqError, UsageError
from irq_convert.nn.function import packed_linear
from irq_convert.nn.packed import PackedWeight, format_of_tensor


class IrqLinear(PackedWeight, nn.Linear):  # type: ignore[override]  # weight is read-only
    """`y = x W^T + bias` with `W` stored packed; the input's dtype is the compute dtype.

    The packed parts never require gradients and keep their dtypes under `.to(dtype)`, `.half()`
    and the like; only `bias` follows.
    """

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
        self._allocate(fmt, device, dtype)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, bias: torch.Tensor | None = None) -> IrqLinear:
        """A layer over the tensors of `q` themselves (no copy); `bias` `[rows]` in any dtype."""
        fmt = format_of_tensor(q)
        layer = cls(q.cols, q.codes.shape[0], fmt, bias=False, device="meta")._take(q)
        if bias is not None:
            if bias.shape != (layer.out_features,):
                raise UsageError(
                    f"bias has shape {list(bias.shape)}, the weight {layer.out_features} rows"
                )
            layer.bias = nn.Parameter(bias.detach())
            layer.dense_dtype = bias.dtype
        return layer

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.out_features, self.in_features

    def reset_parameters(self) -> None:
        """Do nothing: packed codes have no random start."""

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
        q = self.quantized() if q is None else q
        return packed_linear(x, q, bias, training=self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, codebook={self.fmt.codebook}, "
            f"block_size={self.fmt.block_size}, bits_per_weight={self.bits_per_weight():.3f}"
        )


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


def autocast_input(x: torch.Tensor) -> torch.Tensor:
    """`x` in autocast's dtype where autocast would cast the input of a dense layer."""
    kind = x.device.type
    eligible = x.is_floating_point() and x.dtype != torch.float64 and kind != "meta"
    if eligible and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
