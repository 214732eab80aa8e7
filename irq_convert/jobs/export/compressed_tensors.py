"""`--to compressed-tensors`: pack-quantized weights with integer zero points, group by group.

`w = (q - zp) * step` with `step = 2 scale / (L - 1)`: codes and zero points as they are, the step
rounded once to its dtype. Codes lie along the row and zero points down the column as dense streams
of bits, lowest first, in words of 32 bits. An artifact whose zero points are not integers is
refused, or fitted anew where that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from irq_convert.artifact.config import module_name
from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.cast import narrow
from irq_convert.checkpoint.float_dtypes import WORDS
from irq_convert.checkpoint.state_dict import HEADS
from irq_convert.checkpoint.writer import TensorSpec
from irq_convert.core.codebook import get_codebook
from irq_convert.core.packing import pack_codes, unpack_codes
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.errors import UsageError
from irq_convert.jobs.export.compressed_tensors_config import Kept, packed_config
from irq_convert.jobs.export.folder import plan_export_folder, write_export_folder
from irq_convert.jobs.export.grids import GridCheck, check_grids
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.target import ExportPlan, PlannedTensor, Target, TargetResult
from irq_convert.jobs.export.tiles import (
    DenseEncoder,
    Encoded,
    Encoder,
    Piece,
    by_group,
    group_size,
    of_one_expert,
    outside_layers,
    why_no_linear,
)
from irq_convert.jobs.export.vllm_notes import vllm_notes
from irq_convert.jobs.export.zero_points import constant_codes, refit, zero_points
from irq_convert.progress import Progress

GROUPS = (16, 32, 64, 128, 256, 512, 1024)
WORD_BITS = 32


@dataclass(frozen=True)
class PackedEncoder(Encoder):
    """Codes, steps and zero points; `dtype` is that of the steps. `refit`: they may change."""

    group: int = 0
    refit: bool = False

    row_multiple = WORD_BITS

    @property
    def module(self) -> str:
        return module_name(self.tensor.name)

    def outputs(self) -> tuple[TensorSpec, ...]:
        shape = self.tensor.shape
        groups = shape.cols // self.group
        return (
            TensorSpec(
                f"{self.module}.weight_packed", "I32", (shape.rows, _words(shape.cols, shape.bits))
            ),
            TensorSpec(f"{self.module}.weight_scale", self.dtype, (shape.rows, groups)),
            TensorSpec(
                f"{self.module}.weight_zero_point", "I32", (_words(shape.rows, shape.bits), groups)
            ),
            TensorSpec(f"{self.module}.weight_shape", "I64", (2,)),
        )

    def encode(self, tile: QuantizedTensor, dense: torch.Tensor, start: int) -> Encoded:
        old = unpack_codes(tile.codes, self.tensor.shape.bits, tile.cols)
        codes, zero, step = self._fit(tile, dense, old)
        stored = narrow(step, self.dtype, self.tensor.name)
        values = codes.view(*zero.shape, self.group).double()
        values = values.sub_(zero.double()[:, :, None]).mul_(stored.double()[:, :, None])
        packed = pack_words(codes, self.tensor.shape.bits)
        zeros = pack_words(zero.T.contiguous(), self.tensor.shape.bits).T.contiguous()
        above = start * self.tensor.shape.bits // WORD_BITS  # words of zero points before
        pieces = [
            Piece(f"{self.module}.weight_packed", packed, start * packed[:1].nbytes),
            Piece(f"{self.module}.weight_scale", stored, start * stored[:1].nbytes),
            Piece(f"{self.module}.weight_zero_point", zeros, above * zeros[:1].nbytes),
        ]
        if not start:
            shape = torch.tensor([self.tensor.shape.rows, self.tensor.shape.cols])
            pieces.append(Piece(f"{self.module}.weight_shape", shape, 0))
        changed = 0 if codes is old else int((codes != old).sum())
        return Encoded(tuple(pieces), values.view(dense.shape), changed)

    def _fit(
        self, tile: QuantizedTensor, dense: torch.Tensor, old: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes `[rows, cols]`, zero points and steps `[rows, groups]`."""
        bits = self.tensor.shape.bits
        shape = (dense.shape[0], tile.cols // self.group, self.group)
        if not get_codebook(self.tensor.format.codebook).uniform:
            fitted = refit(dense.view(shape), None, None, bits)
            return fitted.codes.view(old.shape), fitted.zero_point, fitted.step
        scale = by_group(expand_statistic(tile.scale, tile.scale_grid), self.tensor, self.group)
        tau = by_group(expand_statistic(tile.tau, tile.tau_grid), self.tensor, self.group)
        found = zero_points(scale, tau, bits)
        codes, zero, step = old.view(shape), found.zero_point, found.step
        if bool(found.constant.any()):
            flat = constant_codes(found, tau)[:, :, None]
            codes = torch.where(found.constant[:, :, None], flat, codes)
        if not bool(found.exact.all()):
            fitted, kept = refit(dense.view(shape), codes, found, bits), found.exact
            codes = torch.where(kept[:, :, None], codes, fitted.codes)
            zero = torch.where(kept, zero, fitted.zero_point)
            step = torch.where(kept, step, fitted.step)
        return old if codes.data_ptr() == old.data_ptr() else codes.view(old.shape), zero, step


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD_BITS)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack `codes`, uint8 `[rows, cols]`, to int32 `[rows, ceil(cols * bits / 32)]`.

    The stream of bits is that of `irq_convert.core.packing`, cut into little-endian words.
    """
    packed = pack_codes(codes, bits)
    return torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


class CompressedTensorsTarget(Target):
    """Integer codebooks with integer zero points as they are, others fitted where asked for."""

    name: ClassVar[str] = "compressed-tensors"
    summary: ClassVar[str] = "pack-quantized, for vLLM and transformers"
    takes: ClassVar[frozenset[str]] = frozenset({"dtype", "refit", "max_shard_bytes"})

    def plan(self, artifact: Artifact, options: ExportOptions, progress: Progress) -> ExportPlan:
        _check_experts(artifact)
        groups = {tensor.name: _group(tensor) for tensor in artifact.quantized}
        _check_groups(artifact, groups)
        packed = [tensor for tensor in artifact.quantized if groups[tensor.name] is not None]
        if not options.refit:
            _check_codebooks(packed)
        grids = check_grids(packed, options.tile_weights, progress)
        if not options.refit:
            _check_zero_points(packed, grids)

        def encoder(tensor: StoredTensor, dtype: str) -> Encoder:
            group = groups[tensor.name]
            if group is None:
                return DenseEncoder(tensor, dtype)
            steps = "F32" if options.dtype == "auto" else dtype
            return PackedEncoder(tensor, steps, group, options.refit)

        kept = {
            module_name(t.name): Kept(t.shape.bits, group)
            for t in packed
            if (group := groups[t.name]) is not None
        }
        dense = [module_name(name) for name, group in groups.items() if group is None]
        if any(map(outside_layers, groups)):
            dense.append(HEADS[0])  # one that is tied has no tensor that says so
        ignored = (*artifact.config.modules_to_not_convert, *dense)
        folder = plan_export_folder(
            artifact,
            options,
            encoder,
            lambda config: packed_config(config, kept, ignored),
        )
        tensors = (_planned(i.encoder, grids) for i in folder.tensors if i.encoder is not None)
        notes = (*_notes(kept), *vllm_notes(packed, kept, set(ignored)))
        return ExportPlan(artifact, options, folder.files, tuple(tensors), notes, folder)

    def write(self, plan: ExportPlan, folder: Path, progress: Progress) -> TargetResult:
        return TargetResult(write_export_folder(plan.detail, folder, plan.options, progress))


def _group(tensor: StoredTensor) -> int | None:
    """Group size; None for what has to stay dense."""
    return None if _why_dense(tensor) else group_size(tensor, GROUPS)


def _why_dense(tensor: StoredTensor) -> str | None:
    """Why its readers would not take `tensor` packed: vLLM packs linear layers of decoders."""
    table = "it is an embedding or a head" if outside_layers(tensor.name) else None
    return why_no_linear(tensor) or table


def _check_experts(artifact: Artifact) -> None:
    """Refuse mixtures that the readers load as something else, or not at all."""
    kind = str((artifact.checkpoint.config or {}).get("model_type"))
    if kind.startswith("llama4"):
        raise UsageError(
            f"config.json says model_type {kind!r}: transformers takes its experts apart where "
            "compressed-tensors is used, and would leave them random: export --to dense"
        )
    for tensor in artifact.quantized:
        if of_one_expert(tensor.name):
            raise UsageError(
                f"{tensor.name}: is of one expert of a mixture, which transformers stacks while "
                "loading and cannot when it is packed with zero points: export --to dense"
            )


def _check_groups(artifact: Artifact, groups: Mapping[str, int | None]) -> None:
    if not any(groups.values()):
        tensor = artifact.quantized[0]
        why = _why_dense(tensor)
        if why is not None:
            raise UsageError(
                f"{tensor.name} {list(tensor.source_shape)}: {why}, which compressed-tensors does "
                "not hold, nor does it any other tensor: export --to dense"
            )
        raise UsageError(
            f"{tensor.name} {list(tensor.source_shape)}: its columns cannot be cut into equal "
            f"groups out of blocks of {tensor.format.block_size}, which compressed-tensors needs, "
            "nor any other tensor's: export --to dense, or quantize with a smaller --block-size"
        )


def _check_codebooks(tensors: list[StoredTensor]) -> None:
    for tensor in tensors:
        if not get_codebook(tensor.format.codebook).uniform:
            raise UsageError(
                f"{tensor.name}: has codebook {tensor.format.codebook}, whose levels are not "
                "uniform, and compressed-tensors holds uniform ones: export --to dense, quantize "
                "with --codebook int --zero-point integer, or add --refit to lose precision"
            )


def _check_zero_points(tensors: list[StoredTensor], grids: Mapping[str, GridCheck]) -> None:
    for tensor in tensors:
        found = grids[tensor.name]
        if found.off:
            raise UsageError(
                f"{tensor.name}: {found.off} of {found.blocks} blocks have a zero point that is "
                "no integer, which compressed-tensors cannot hold: quantize with --codebook int "
                "--zero-point integer, export --to dense, or add --refit to lose precision"
            )


def _planned(encoder: Encoder, grids: Mapping[str, GridCheck]) -> PlannedTensor:
    tensor, dtype = encoder.tensor, WORDS[encoder.dtype]
    if not isinstance(encoder, PackedEncoder):
        why = _why_dense(tensor)
        uneven = f"blocks of {tensor.format.block_size} do not cut its columns into equal groups"
        return PlannedTensor(tensor.name, f"dense {dtype}", exact=True, why=why or uneven)
    stored = f"{tensor.shape.bits} bit, group {encoder.group}, scales {dtype}"
    grid = grids[tensor.name]
    if not grid.off:
        return PlannedTensor(tensor.name, stored, exact=True)
    uniform = get_codebook(tensor.format.codebook).uniform
    why = "zero points were no integers" if uniform else "levels were not uniform"
    return PlannedTensor(tensor.name, stored, exact=False, why=f"{why}: fitted anew")


def _notes(kept: Mapping[str, Kept]) -> tuple[str, ...]:
    if len(set(kept.values())) == 1:
        return ()
    return (
        "several widths or group sizes: transformers 5.23 reads one only; the compressed-tensors "
        "package reads them",
    )


TARGET = CompressedTensorsTarget()
