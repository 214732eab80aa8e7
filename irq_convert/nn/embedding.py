"""`IrqEmbedding`: a lookup table whose `weight` parameter is the packed codes.

Only the rows that are asked for are unpacked. It is an `nn.Embedding`, so that programs find it;
how the weight is held is in `packed.py`. An output head that is tied to it is an `IrqLinear` that
holds the same parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.nn.packed import PackedWeight, format_of_tensor
from irq_convert.nn.parts import take_rows

WITNESS = "dense_like"
"""An empty parameter of the dense dtype, in no file.

transformers says that a model's dtype is that of its first floating parameter. This comes before
the grids, which are float32 in every model. It is made off meta, since no loader would bring it.
"""


class IrqEmbedding(PackedWeight, nn.Embedding):  # type: ignore[override]  # as IrqLinear
    """Rows of a packed `[num_embeddings, embedding_dim]` weight by their numbers.

    The packed parts never require gradients and keep their dtypes under `.to(dtype)`, `.half()`
    and the like; rows come out in the dtype that the dense table would have then.
    """

    dense_like: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        fmt: ModuleFormat,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate the parts of the weight, all zero bytes; `dtype` is that of looked up rows.

        `padding_idx` is kept for whoever asks: a lookup does not depend on it. Raises `UsageError`
        when `fmt.columns` is not `embedding_dim`.
        """
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        place = "cpu" if str(device) == "meta" else device
        empty = torch.empty(0, dtype=dtype, device=place)
        self.register_parameter(WITNESS, nn.Parameter(empty, requires_grad=False))
        self._allocate(fmt, device, dtype)
        self.around: nn.Embedding | None = None

    @classmethod
    def from_quantized(cls, q: QuantizedTensor, dtype: torch.dtype | None = None) -> IrqEmbedding:
        """A table over the tensors of `q` themselves (no copy), whose rows come out in `dtype`.

        Raises `IrqError` when the parts of `q` do not fit together.
        """
        fmt = format_of_tensor(q)
        made = cls(q.codes.shape[0], q.cols, fmt, device="meta", dtype=dtype)._take(q)
        made.place_witness()
        return made

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows, and numbers of each."""
        return self.num_embeddings, self.embedding_dim

    @property
    def lookup_dtype(self) -> torch.dtype:
        """The dtype of looked up rows."""
        return self.dense_like.dtype

    def place_witness(self) -> None:
        """Put the empty parameter where the codes are; on the disk accelerate looks for it, too."""
        codes, witness = self._parameters["weight"], self.dense_like
        assert codes is not None
        if not codes.is_meta:
            if witness.device != codes.device:
                empty = torch.empty(0, dtype=witness.dtype, device=codes.device)
                self.dense_like = nn.Parameter(empty, requires_grad=False)
            return
        stored = getattr(getattr(self, "_hf_hook", None), "weights_map", None)
        if stored is not None:
            stored.dataset.state_dict[stored.prefix + WITNESS] = torch.empty(0, dtype=witness.dtype)

    def wrap(self, dense: nn.Embedding) -> None:
        """Do with the rows what the class of `dense` does, such as scaling them.

        It must look `weight` up by the numbers, and do the same to every row. Its own weight and
        `padding_idx`, which names a row, are dropped; its buffers stay.
        """
        rows = dense.weight.new_empty(0, self.embedding_dim)
        del dense.weight
        dense.register_buffer("weight", rows, persistent=False)
        dense.padding_idx = None
        self.around = dense

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integers of any shape `[...]` to rows `[..., embedding_dim]`.

        Raises `IndexError` for a number that is no row, on the CPU.
        """
        rows = packed_embedding(input.reshape(-1), self.quantized(), self.lookup_dtype)
        if self.around is None:
            return rows.view(*input.shape, self.embedding_dim)
        numbers = torch.arange(input.numel(), device=input.device).view(input.shape)
        found: torch.Tensor = torch.func.functional_call(self.around, {"weight": rows}, (numbers,))
        return found

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + WITNESS, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *more)
        if prefix + WITNESS in missing:
            missing.remove(prefix + WITNESS)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, codebook={self.fmt.codebook}, "
            f"block_size={self.fmt.block_size}, bits_per_weight={self.bits_per_weight():.3f}"
        )


def dense_embedding(layer: IrqEmbedding, weight: nn.Parameter) -> nn.Embedding:
    """The dense table of `layer` with `weight` `[num_embeddings, embedding_dim]`, of its class."""
    dense = layer.around
    if dense is None:
        dense = nn.Embedding(*layer.matrix_shape, device="meta")
    else:
        del dense.weight
    dense.padding_idx = layer.padding_idx
    dense.weight = weight
    return dense.train(layer.training)


def packed_embedding(ids: torch.Tensor, q: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows `ids`, `[n]` of integers, of the dense values of `q`: `[n, cols]` in `dtype`.

    Raises `IndexError` for a number that is no row, on the CPU.
    """
    if type(ids) is torch.Tensor and not torch.compiler.is_compiling():
        return _lookup(ids, q, dtype)
    # An operator keeps compilers from looking inside.
    parts = (q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid)
    found: torch.Tensor = torch.ops.irq.embedding(
        ids, *parts, q.cols, q.codebook, q.block_size, dtype
    )
    return found


def _lookup(ids: torch.Tensor, q: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
    return dequantize_tensor(take_rows(q, ids), dtype)


@torch.library.custom_op("irq::embedding", mutates_args=())
def _embedding_op(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    scale_grid: torch.Tensor | None,
    tau_grid: torch.Tensor | None,
    cols: int,
    codebook: str,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    q = QuantizedTensor(codes, scale, tau, scale_grid, tau_grid, cols, codebook, block_size)
    return _lookup(ids, q, dtype)


@_embedding_op.register_fake
def _embedding_fake(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    tau: torch.Tensor,
    scale_grid: torch.Tensor | None,
    tau_grid: torch.Tensor | None,
    cols: int,
    codebook: str,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(ids.shape[0], cols, dtype=dtype)
