"""One quantized tensor in another layout, tile by tile: what an encoder is, and the plain one.

An encoder gets tiles of rows and returns the bytes to write and the numbers they stand for, so that
the loss is measured where it arises.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from irq_convert.artifact.config import module_name
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.cast import narrow
from irq_convert.checkpoint.writer import TensorSpec
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.jobs.export.target import Difference


@dataclass(frozen=True)
class Piece:
    """A contiguous CPU tensor to be written at byte `offset` of output tensor `name`."""

    name: str
    data: torch.Tensor
    offset: int


@dataclass(frozen=True)
class Encoded:
    """A tile as it is written.

    `values`, float64 `[rows, cols]`, is what the pieces stand for in exact arithmetic;
    `changed_codes` counts weights whose code is another than the artifact's.
    """

    pieces: tuple[Piece, ...]
    values: torch.Tensor
    changed_codes: int = 0


@dataclass(frozen=True)
class Encoder(ABC):
    """How one quantized tensor is written; `row_multiple` is what its tiles begin on."""

    tensor: StoredTensor
    dtype: str

    row_multiple = 1

    @property
    def turned(self) -> bool:
        """Whether the pieces are rows of the transpose of what is written, in order."""
        return False

    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors written for it."""

    @abstractmethod
    def encode(self, tile: QuantizedTensor, dense: torch.Tensor, start: int) -> Encoded:
        """Rows from `start` on: `tile` as stored, `dense` float32 `[rows, cols]` as it decodes.

        Raises `IrqError` when a number does not fit the dtype.
        """


@dataclass(frozen=True)
class DenseEncoder(Encoder):
    """The decoded weights in `dtype`, rounded once."""

    @property
    def turned(self) -> bool:
        return self.tensor.format.transposed

    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.tensor.name, self.dtype, self.tensor.source_shape),)

    def encode(self, tile: QuantizedTensor, dense: torch.Tensor, start: int) -> Encoded:
        data = narrow(dense, self.dtype, self.tensor.name)
        offset = start * dense.shape[1] * data.element_size()
        return Encoded((Piece(self.tensor.name, data, offset),), data.double())


def difference(
    name: str, dense: torch.Tensor, values: torch.Tensor, changed_codes: int = 0
) -> Difference:
    """Compare what is written, `values` (float64, overwritten), with `dense` (float32)."""
    exact = dense.double()
    gap = values.sub_(exact)
    empty = not gap.numel()
    return Difference(
        name,
        gap.numel(),
        0.0 if empty else float(gap.abs().max()),
        0.0 if empty else float(exact.abs().max()),
        float(gap.square_().sum()),
        float(exact.square_().sum()),
        changed_codes,
    )


def group_size(tensor: StoredTensor, allowed: tuple[int, ...]) -> int | None:
    """The largest of the `allowed` sizes that divides the tensor's blocks and its columns.

    Weights of one such group share a scale and a tau, as those of the whole block do, so a layout
    with smaller groups holds the tensor unchanged. None where no size divides both.
    """
    shape = tensor.shape
    fitting = (n for n in allowed if shape.block_size % n == 0 and shape.cols % n == 0)
    return max(fitting, default=None)


_NUMBERED = re.compile(r"(^|\.)\d+\.")
_OF_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def of_one_expert(name: str) -> bool:
    """Whether tensor `name` belongs to one of the experts of a layer."""
    return _OF_ONE_EXPERT.search(name) is not None


def across_experts(name: str) -> str:
    """`name` without the number of the expert: the same for all that one layer stacks."""
    return _OF_ONE_EXPERT.sub(r"\1experts.", name)


def outside_layers(name: str) -> bool:
    """Whether tensor `name` is in no numbered layer: embeddings and heads, when quantized."""
    return _NUMBERED.search(name) is None


def why_no_linear(tensor: StoredTensor) -> str | None:
    """Why a layout of linear layers, `[outputs, inputs]`, does not hold `tensor`; None: it does."""
    if len(tensor.leading) != 1:
        return "it is a stack of matrices"
    if tensor.format.transposed:
        return "its source is the transpose of a linear layer's weight"
    if tensor.name == module_name(tensor.name):
        return "its name does not end in .weight"
    return None


def by_group(statistic: torch.Tensor, tensor: StoredTensor, group: int) -> torch.Tensor:
    """`[rows, blocks_per_row]` repeated to `[rows, cols / group]`."""
    repeated = statistic.repeat_interleave(tensor.shape.block_size // group, dim=1)
    return repeated[:, : tensor.shape.cols // group]
