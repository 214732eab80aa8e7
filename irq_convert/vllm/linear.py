"""Linear layers: which matrices a layer of vLLM is made of, and what of them a rank holds.

Imports vLLM. q, k and v, or gate and up, are one layer there; here each keeps its own codes, grids
and width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.parts import SUFFIXES
from irq_convert.errors import IrqError
from irq_convert.vllm.held import HeldWeights, Piece
from irq_convert.vllm.shards import Shard, joined

_KNOWN = {
    *("ReplicatedLinear", "ColumnParallelLinear", "RowParallelLinear"),
    *("MergedColumnParallelLinear", "MergedReplicatedLinear", "QKVParallelLinear"),
}
"""Layers whose split over ranks is known; others are served by one rank."""
_NUMBERS = {"q": 0, "k": 1, "v": 2}


class IrqLinearMethod(LinearMethodBase):
    """Products with packed weights, of matrices `names` of the files in `formats`, None dense."""

    def __init__(self, names: tuple[str, ...], formats: tuple[ModuleFormat | None, ...]) -> None:
        super().__init__()
        self.names = names
        self.formats = formats
        self.empty = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Plan what the rank holds; parameters by the names of the files take it as it comes.

        Raises `IrqError`, naming the layer, for one that is merged or split in an unknown way.
        """
        shards = _shards(layer, self.names, input_size_per_partition, input_size)
        pieces = tuple(
            Piece(name, input_size, shard, fmt)
            for name, shard, fmt in zip(self.names, shards, self.formats, strict=True)
        )
        self.empty = is_dummy()
        hold(layer, HeldWeights(pieces, params_dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises `IrqError` naming a tensor that the files lack."""
        layer.irq.finish(self.empty)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` `[..., inputs]` to `[..., outputs]`."""
        found: torch.Tensor = layer.irq(x, bias)
        return found

    def dequantize_weight(self, layer: Any) -> torch.Tensor:
        """The dense weight of this rank, `[outputs, inputs]`."""
        found: torch.Tensor = layer.irq.dense(layer.params_dtype)
        return found


def hold(layer: Any, held: HeldWeights) -> None:
    """Let `layer` take the tensors of `held` under the names that its files have for them.

    The parameters under those names stay empty: vLLM counts them as loaded, and LoRA asks the first
    for its device.
    """
    layer.irq = held
    suffixes = dict.fromkeys(s for piece in held.pieces for s in piece.suffixes)
    for suffix in (s for s in SUFFIXES if s in suffixes):
        dtype = _stored_dtype(held, suffix)
        empty = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        empty.weight_loader = partial(_take, held, suffix)  # type: ignore[attr-defined]
        layer.register_parameter(f"weight{suffix}", empty)


def is_dummy() -> bool:
    """Whether vLLM was asked to load no weights at all."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.load_config.load_format == "dummy"


def _stored_dtype(held: HeldWeights, suffix: str) -> torch.dtype:
    fmt = next(p.fmt for p in held.pieces if suffix in p.suffixes and (p.fmt or not suffix))
    if fmt is None:
        return held.dtype
    if suffix.endswith("_grid"):
        return torch.float32
    stored = {"": "uint8", "_scale": fmt.scale_dtype, "_tau": fmt.tau_dtype}[suffix]
    found: torch.dtype = getattr(torch, stored)
    return found


def _take(
    held: HeldWeights, suffix: str, parameter: Any, tensor: torch.Tensor, shard_id: Any = None
) -> None:
    """A parameter's `weight_loader`; `shard_id` tells the parts of a merged layer apart."""
    if len(held.pieces) == 1:  # also a tensor that the files have merged
        held.take(0, suffix, tensor)
        return
    number = _NUMBERS.get(shard_id, shard_id) if isinstance(shard_id, str) else shard_id
    if type(number) is not int or not 0 <= number < len(held.pieces):
        raise IrqError(
            f"{held.pieces[0].name}: vLLM gave the weight of part {shard_id!r} of a layer of "
            f"{len(held.pieces)} matrices, which irq artifacts are not served for"
        )
    held.take(number, suffix, tensor)


def _shards(layer: Any, names: tuple[str, ...], own_columns: int, columns: int) -> list[Shard]:
    """What this rank holds of each of the matrices `names`."""
    sizes = list(layer.output_partition_sizes)
    ranks, kind = layer.tp_size, type(layer).__name__
    if ranks > 1 and kind not in _KNOWN:
        raise IrqError(
            f"{names[0]}: how {kind} is split over ranks is not known to irq-convert: serve this "
            "model without --tensor-parallel-size"
        )
    if len(names) not in (1, len(sizes)):
        raise IrqError(
            f"{names[0]}: vLLM makes {len(sizes)} parts of {len(names)} matrices in {kind}, which "
            "irq artifacts are not served for: convert with these layers left dense (--keep)"
        )
    span = None
    if own_columns != columns:
        span = (layer.tp_rank * own_columns, (layer.tp_rank + 1) * own_columns)
    starts = [_rank(layer, number) * size for number, size in enumerate(sizes)]
    if len(names) == 1:  # the files may have them merged, one below the other
        for number, offset in enumerate(_offsets(layer, sizes)):
            starts[number] += offset
        rows = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
        return [Shard(joined(rows), span)]
    found = zip(starts, sizes, strict=True)
    return [Shard(((start, start + size),), span) for start, size in found]


def _rank(layer: Any, number: int) -> int:
    """Which of the equal parts of matrix `number` is this rank's."""
    if layer.tp_size == 1 or not _splits_rows(layer):
        return 0
    copies = getattr(layer, "num_kv_head_replicas", 1) if number else 1
    return int(layer.tp_rank // copies)


def _splits_rows(layer: Any) -> bool:
    return sum(layer.output_partition_sizes) != layer.output_size


def _offsets(layer: Any, sizes: list[int]) -> list[int]:
    """Where the stored rows of each part begin in a matrix that the files have merged."""
    whole = list(getattr(layer, "output_sizes", [layer.output_size]))
    if hasattr(layer, "total_num_kv_heads"):
        heads, kv = layer.total_num_heads, layer.total_num_kv_heads
        whole = [heads * layer.head_size, kv * layer.head_size, kv * layer.v_head_size]
    if len(whole) != len(sizes):
        return [0] * len(sizes)
    return [sum(whole[:number]) for number in range(len(whole))]
