"""The adapters of a model that stand on packed layers, what these lack, and the start they get."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from irq_convert.artifact.adapter import BETA
from irq_convert.artifact.contents import Artifact, StoredTensor, read_quantized
from irq_convert.checkpoint.columns import row_tiles
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.error_start import LowRank, nearest_low_rank
from irq_convert.errors import UsageError
from irq_convert.nn.linear import IrqLinear

TILE_ROWS = 256
"""Rows of a source that are read at once, about: whole groups are taken."""


def other_shape(source: Checkpoint, stored: StoredTensor) -> str | None:
    """Half a sentence where `source` lacks a tensor of an artifact, or has it of another shape."""
    info = source.tensors.get(stored.name)
    if info is not None and info.shape == stored.source_shape:
        return None
    what = "lacks it" if info is None else f"has {list(info.shape)}"
    return f"{stored.name} {list(stored.source_shape)}: {source.folder} {what}"


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapter on a packed layer: the layer of PEFT, and the tensor's name in the files."""

    module: str
    layer: Any
    adapter: str
    tensor: str

    @property
    def cols(self) -> int:
        """Inputs of the layer."""
        base: IrqLinear = self.layer.base_layer
        return base.in_features

    @property
    def block_size(self) -> int | None:
        """Of a pooled adapter, None of others."""
        variant = self.layer.lora_variant.get(self.adapter)
        found: int | None = getattr(variant, "block_size", None)
        return found

    def start(self, delta: torch.Tensor, moments: torch.Tensor) -> LowRank:
        """Set A and B by the error `delta`, `[rows, cols]`; arguments as `nearest_low_rank`.

        The adapter's scaling is divided out of both, betas are 0. Directions in which nothing is
        lost keep the A that is there, and have a B of 0.
        """
        rank = self.layer.r[self.adapter]
        found = nearest_low_rank(delta, moments, rank, block_size=self.block_size, name=self.tensor)
        self._set(found)
        return found

    def _set(self, found: LowRank) -> None:
        a = self.layer.lora_A[self.adapter].weight
        b = self.layer.lora_B[self.adapter].weight
        half, rank = self.layer.scaling[self.adapter] ** -0.5, len(found.a)
        with torch.no_grad():
            b.zero_()
            a[:rank] = (found.a * half).to(a)
            b[:, :rank] = (found.b * half).to(b)
            betas = getattr(self.layer, BETA, {})
            if self.adapter in betas:
                betas[self.adapter].weight.zero_()


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, AdaptedLayer]:
    """By tensor, the packed layers of `model` that have `adapter`, in the model's order.

    Raises `UsageError` where there is none.
    """
    found: dict[str, AdaptedLayer] = {}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, IrqLinear) and adapter in getattr(module, "lora_A", {}):
            found[base.label] = AdaptedLayer(name, module, adapter, base.label)
    if not found:
        raise UsageError(
            f"no adapter called {adapter!r} of LoRA's kind stands on a quantized layer: there is "
            "no error to start from"
        )
    return found


class Weights:
    """The same matrices in the source and in the artifact, read by name, `[rows, cols]` float32."""

    def __init__(self, artifact: Artifact, source: Checkpoint, device: str = "cpu") -> None:
        self.source, self.device = source, device
        self._stored = {tensor.name: tensor for tensor in artifact.quantized}

    @property
    def names(self) -> frozenset[str]:
        """All tensors that are quantized."""
        return frozenset(self._stored)

    def check(self, tensors: Iterable[str]) -> None:
        """Raise `UsageError` naming the first of `tensors` that the source has not, or otherwise.

        The source may be of another format, but of its shapes and with its numbers as floats.
        """
        for name in tensors:
            stored, info = self._stored.get(name), self.source.tensors.get(name)
            if stored is None:
                raise UsageError(f"{name}: the model has it quantized, and the artifact has not")
            other = other_shape(self.source, stored)
            if other is not None:
                raise UsageError(f"{other}: give the source that the artifact was made from")
            if info is not None and info.dtype not in FLOATS:
                raise UsageError(
                    f"{name} is {info.dtype} in {self.source.folder}, which is quantized itself: "
                    "give the source that the artifact was made from"
                )

    def info(self, name: str) -> TensorInfo:
        """A tensor of the source."""
        return self.source.tensors[name]

    def dense(self, name: str) -> torch.Tensor:
        """What the source has; `IrqError` when a file cannot be read."""
        stored, info = self._stored[name], self.info(name)
        found = torch.empty(stored.shape.rows, stored.shape.cols)
        with TileReader() as reader:
            for start, tile in row_tiles(reader, info, TILE_ROWS, stored.format.transposed):
                found[start : start + len(tile)] = tile
        return found.to(self.device)

    def lost(self, name: str) -> torch.Tensor:
        """`W - W^`."""
        return self.dense(name) - self.quantized(name)

    def quantized(self, name: str) -> torch.Tensor:
        """What the artifact has; `IrqError` when a file cannot be read."""
        stored = self._stored[name]
        with TileReader() as reader:
            parts = read_quantized(reader, stored, 0, stored.shape.rows)
        return dequantize_tensor(parts).to(self.device)
