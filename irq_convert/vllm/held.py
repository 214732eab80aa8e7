"""The weights of one layer of vLLM: matrices of the files, gathered part by part and cut to a rank.

vLLM hands over whole stored tensors, in any order. A matrix is cut when all its parts are there, so
that beside what stays no more than one is in memory. Nothing here is of vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from irq_convert.artifact.config import ModuleFormat
from irq_convert.core.blocks import BlockShape
from irq_convert.core.parts import SUFFIXES, stored_parts
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import IrqError
from irq_convert.vllm.product import DENSE, PARTS, codebook_number, matrix
from irq_convert.vllm.shards import Shard, check_columns, cut


@dataclass(frozen=True)
class Piece:
    """A stored matrix `[.., cols]` and what of it is held; dense without `fmt`."""

    name: str
    cols: int
    shard: Shard
    fmt: ModuleFormat | None

    def __post_init__(self) -> None:
        if self.fmt is not None:
            check_columns(self.name, self.shard, self.cols, self.fmt.block_size)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What follows the tensor's name in the names of its parts."""
        if self.fmt is None:
            return ("",)
        shape = BlockShape(1, self.cols, self.fmt.block_size, self.fmt.bits)
        found = stored_parts(shape, (1,), self.fmt.scale_dtype, self.fmt.tau_dtype)
        return tuple(suffix for suffix in SUFFIXES if suffix in found)


class HeldWeights(nn.Module):
    """The weights of a layer, one below the other.

    `dtype` is that of dense pieces, `device` where all will lie. Parameters appear when a piece is
    complete, `codes_0`, `scale_0` and so on, numbered as the pieces.
    """

    def __init__(
        self, pieces: tuple[Piece, ...], dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.pieces = pieces
        self.dtype = dtype
        self.device = torch.get_default_device() if device is None else device
        self.rows = [piece.shard.height for piece in pieces]
        self.codebooks = [
            DENSE if piece.fmt is None else codebook_number(piece.fmt.codebook) for piece in pieces
        ]
        self.block_sizes = [0 if piece.fmt is None else piece.fmt.block_size for piece in pieces]
        self._waiting: list[dict[str, torch.Tensor]] = [{} for _ in pieces]
        self._done: set[int] = set()

    def take(self, number: int, suffix: str, tensor: torch.Tensor) -> None:
        """Take the whole stored `tensor`, the part `suffix` of the matrix of piece `number`.

        Raises `IrqError` where a part does not fit, `UsageError` where the matrix cannot be cut.
        """
        piece = self.pieces[number]
        if suffix not in piece.suffixes:
            raise IrqError(f"{piece.name}.weight{suffix} is not a part of {_kind(piece)}")
        self._waiting[number][suffix] = tensor
        if len(self._waiting[number]) == len(piece.suffixes):
            parts = self._waiting[number]
            self._waiting[number] = {}
            self._keep(number, parts)

    def finish(self, empty: bool = False) -> None:
        """All tensors were handed over; with `empty` none was, and the weights are zeros.

        Raises `IrqError` naming what is missing.
        """
        for number, piece in enumerate(self.pieces):
            if number in self._done:
                continue
            missing = [s for s in piece.suffixes if s not in self._waiting[number]]
            if not empty:
                raise IrqError(f"{piece.name}.weight{missing[0]} is not in the files of the model")
            self._register(number, self._zeros(piece))

    def parts(self) -> list[torch.Tensor]:
        """`PARTS` tensors of each piece, as `served_linear` takes them."""
        names = _names(len(self.pieces))
        return [getattr(self, name) for name in names]

    def quantized(self, number: int) -> QuantizedTensor:
        """Piece `number`, which is packed, on the parameters' own memory."""
        own = self.parts()[PARTS * number : PARTS * (number + 1)]
        piece = self.pieces[number]
        cols = piece.shard.width(piece.cols)
        return matrix(own, cols, self.codebooks[number], self.block_sizes[number])

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` floating `[..., cols]` to `[..., rows]` of the same dtype; `bias` `[rows]`."""
        found: torch.Tensor = torch.ops.irq.served_linear(
            x, bias, self.parts(), self.rows, self.codebooks, self.block_sizes
        )
        return found

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """All rows as a dense matrix `[rows, cols]` in `dtype`."""
        from irq_convert.core.dequantize import dequantize_tensor

        found = []
        for number, piece in enumerate(self.pieces):
            if piece.fmt is None:
                found.append(self.parts()[PARTS * number].to(dtype))
            else:
                found.append(dequantize_tensor(self.quantized(number), dtype))
        return torch.cat(found)

    def _keep(self, number: int, parts: dict[str, torch.Tensor]) -> None:
        piece = self.pieces[number]
        self._check(piece, parts[""])
        if piece.fmt is None:
            rows = torch.cat([parts[""][begin:end] for begin, end in piece.shard.rows or ((0, 0),)])
            if piece.shard.columns is not None:
                rows = rows[:, slice(*piece.shard.columns)]
            self._register(number, [rows.to(self.dtype)])
            return
        codes, scale, tau, *grids = (parts.get(suffix) for suffix in SUFFIXES)
        assert codes is not None
        assert scale is not None
        assert tau is not None
        own = (piece.cols, piece.fmt.codebook, piece.fmt.block_size)
        whole = QuantizedTensor(codes, scale, tau, grids[0], grids[1], *own)
        whole.check(f"{piece.name}.weight")
        q = cut(piece.name, whole, piece.shard)
        self._register(number, [q.codes, q.scale, q.tau, q.scale_grid, q.tau_grid])

    def _check(self, piece: Piece, first: torch.Tensor) -> None:
        last = piece.shard.rows[-1][1] if piece.shard.rows else 0
        wide = piece.fmt is None and tuple(first.shape[1:]) != (piece.cols,)
        if first.dim() != 2 or first.shape[0] < last or wide:
            raise IrqError(
                f"{piece.name}.weight has shape {list(first.shape)}, and vLLM's layer asks for "
                f"row {last} of {piece.cols} columns: the model's config.json is not of these files"
            )

    def _register(self, number: int, parts: list[torch.Tensor | None]) -> None:
        tensors = parts + [None] * (PARTS - len(parts))
        for name, part in zip(_names(1, number), tensors, strict=True):
            own = torch.empty(0, device=self.device)
            if part is not None:  # what vLLM hands over may be a map of the file
                own = torch.empty(part.shape, dtype=part.dtype, device=self.device).copy_(part)
            self.register_parameter(name, nn.Parameter(own, requires_grad=False))
        self._done.add(number)

    def _zeros(self, piece: Piece) -> list[torch.Tensor | None]:
        rows, cols = piece.shard.height, piece.shard.width(piece.cols)
        if piece.fmt is None:
            return [torch.zeros(rows, cols, dtype=self.dtype, device="cpu")]
        shape = BlockShape(rows, cols, piece.fmt.block_size, piece.fmt.bits)
        found = stored_parts(shape, (rows,), piece.fmt.scale_dtype, piece.fmt.tau_dtype)
        return [
            torch.zeros(found[s].shape, dtype=found[s].dtype.torch, device="cpu")
            if s in found
            else None
            for s in SUFFIXES
        ]


def _names(pieces: int, first: int = 0) -> list[str]:
    kinds = ("codes", "scale", "tau", "scale_grid", "tau_grid")
    return [f"{kind}_{at}" for at in range(first, first + pieces) for kind in kinds]


def _kind(piece: Piece) -> str:
    return "a dense weight" if piece.fmt is None else f"a weight in {piece.fmt.codebook}"
