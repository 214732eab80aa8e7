"""`--to mlx`: the folder that mlx-lm loads, affine quantized in 2, 3 or 4 bits.

MLX stores `w = scales * q + biases` for groups of 32, 64 or 128 weights of a row. Uniform levels
are `level[q] = 2 q / (L - 1) - 1` with `L = 2^bits`, so

    w = level[q] * scale + tau  =  (2 scale / (L - 1)) * q + (tau - scale)

and the codes stay as they are: MLX packs them as this program does, 32 bits to a word. Scales and
biases are rounded to their dtype, each once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from irq_convert.artifact.config import module_name
from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.head import stored_head
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.cast import narrow
from irq_convert.checkpoint.float_dtypes import WORDS
from irq_convert.checkpoint.writer import TensorSpec
from irq_convert.core.codebook import get_codebook
from irq_convert.core.packing import unpack_codes
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.errors import UsageError
from irq_convert.jobs.export.biases import check_biases
from irq_convert.jobs.export.folder import plan_export_folder, write_export_folder
from irq_convert.jobs.export.mlx_config import MIXTURES, TRIED, mlx_config
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.target import ExportPlan, PlannedTensor, Target, TargetResult
from irq_convert.jobs.export.tiles import (
    DenseEncoder,
    Encoded,
    Encoder,
    Piece,
    across_experts,
    by_group,
    group_size,
    of_one_expert,
    why_no_linear,
)
from irq_convert.progress import Progress

GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class AffineEncoder(Encoder):
    """Codes as words of 32 bits, a scale and a bias a group; `dtype` is that of the two."""

    group: int = 0

    @property
    def module(self) -> str:
        return module_name(self.tensor.name)

    def outputs(self) -> tuple[TensorSpec, ...]:
        shape = self.tensor.shape
        groups = (shape.rows, shape.cols // self.group)
        return (
            TensorSpec(f"{self.module}.weight", "U32", (shape.rows, shape.row_bytes // 4)),
            TensorSpec(f"{self.module}.scales", self.dtype, groups),
            TensorSpec(f"{self.module}.biases", self.dtype, groups),
        )

    def encode(self, tile: QuantizedTensor, dense: torch.Tensor, start: int) -> Encoded:
        scale = by_group(expand_statistic(tile.scale, tile.scale_grid), self.tensor, self.group)
        tau = by_group(expand_statistic(tile.tau, tile.tau_grid), self.tensor, self.group)
        steps = (1 << self.tensor.shape.bits) - 1
        scales = narrow(scale.double() * 2 / steps, self.dtype, self.tensor.name)
        biases = narrow(tau.double() - scale.double(), self.dtype, self.tensor.name)
        codes = unpack_codes(tile.codes, self.tensor.shape.bits, tile.cols)
        values = codes.view(*scales.shape, self.group).double()
        values.mul_(scales.double()[:, :, None]).add_(biases.double()[:, :, None])
        return Encoded(
            (
                Piece(f"{self.module}.weight", tile.codes, start * tile.codes.shape[1]),
                Piece(f"{self.module}.scales", scales, start * scales[:1].nbytes),
                Piece(f"{self.module}.biases", biases, start * biases[:1].nbytes),
            ),
            values.view(dense.shape),
        )


class MlxTarget(Target):
    """Integer codebooks as they are; what no group of MLX divides stays dense."""

    name: ClassVar[str] = "mlx"
    summary: ClassVar[str] = "the folder that mlx-lm loads (int codebooks)"
    takes: ClassVar[frozenset[str]] = frozenset({"dtype", "max_shard_bytes"})

    def plan(self, artifact: Artifact, options: ExportOptions, progress: Progress) -> ExportPlan:
        for tensor in artifact.quantized:
            _check_codebook(tensor)
        _check_experts(artifact)
        _check_names(artifact)
        folder = plan_export_folder(
            artifact,
            options,
            _encoder,
            lambda config: mlx_config(_with_head(config, artifact), _formats(artifact)),
            {"format": "mlx"},
        )
        return ExportPlan(
            artifact,
            options,
            folder.files,
            tuple(_planned(item.encoder) for item in folder.tensors if item.encoder is not None),
            _notes(artifact),
            folder,
        )

    def write(self, plan: ExportPlan, folder: Path, progress: Progress) -> TargetResult:
        return TargetResult(write_export_folder(plan.detail, folder, plan.options, progress))


def _check_codebook(tensor: StoredTensor) -> None:
    if not get_codebook(tensor.format.codebook).uniform:
        raise UsageError(
            f"{tensor.name}: has codebook {tensor.format.codebook}, whose levels are not uniform, "
            "and MLX holds uniform ones: export --to dense, or quantize with --codebook int"
        )


def _check_names(artifact: Artifact) -> None:
    """What is sure not to load: mlx-lm takes the names of language models, and all of them."""
    config = artifact.checkpoint.config or {}
    if config.get("model_type") not in TRIED:
        return
    names = [tensor.name for tensor in artifact.in_file_order()]
    for name in names:
        if not name.startswith(("model.", "lm_head.")):
            raise UsageError(
                f"{name}: mlx-lm knows {config['model_type']} tensors as model.* and lm_head.*, as "
                "a causal language model has them, and loads no others: export --to dense"
            )
    if stored_head(artifact) is None and config.get("tie_word_embeddings") is False:
        raise UsageError(
            "lm_head.weight is missing, and config.json says tie_word_embeddings false: mlx-lm "
            "needs it; get the whole model"
        )
    check_biases(config, names, "mlx-lm")


def _with_head(config: dict[str, Any], artifact: Artifact) -> dict[str, Any]:
    """`config` that says so where there is no head: classes of mlx-lm differ in their default."""
    return config if stored_head(artifact) else {**config, "tie_word_embeddings": True}


def _check_experts(artifact: Artifact) -> None:
    """mlx-lm stacks experts while loading, each class its own way: only those tried are written."""
    kind = (artifact.checkpoint.config or {}).get("model_type")
    alike: dict[str, object] = {across_experts(info.name): None for info in artifact.copied}
    for tensor in artifact.quantized:
        single = of_one_expert(tensor.name)
        if not single and len(tensor.leading) == 1:
            continue
        if MIXTURES.get(str(kind)) != ("each" if single else "stacked"):
            held = "each for itself" if single else "stacked"
            raise UsageError(
                f"{tensor.name}: experts of model_type {kind!r}, held {held}, are none that mlx-lm "
                f"is known to load ({', '.join(MIXTURES)} are): export --to dense"
            )
        name, stored = across_experts(tensor.name), (tensor.shape.bits, _group(tensor))
        if alike.setdefault(name, stored) != stored:
            raise UsageError(
                f"{tensor.name}: other experts of its layer are stored in another way, and mlx-lm "
                "stacks them: quantize them alike, or export --to dense"
            )


def _group(tensor: StoredTensor) -> int | None:
    """Group size in MLX; None for what has to stay dense."""
    return None if why_no_linear(tensor) else group_size(tensor, GROUPS)


def _formats(artifact: Artifact) -> dict[str, tuple[int, int] | None]:
    """(bits, group size) of every quantized module, None for those that become dense."""
    found: dict[str, tuple[int, int] | None] = {}
    for tensor in artifact.quantized:
        group = _group(tensor)
        found[module_name(tensor.name)] = None if group is None else (tensor.shape.bits, group)
    if not any(found.values()):
        tensor = artifact.quantized[0]
        why = why_no_linear(tensor)
        if why is not None:
            raise UsageError(
                f"{tensor.name} {list(tensor.source_shape)}: {why}, which MLX does not hold "
                "packed, nor does it any other tensor: export --to dense"
            )
        raise UsageError(
            f"{tensor.name} {list(tensor.source_shape)}: blocks of {tensor.format.block_size} "
            f"cannot be cut into groups of {', '.join(map(str, GROUPS))}, which MLX has, nor any "
            "other tensor's: export --to dense, or quantize with --block-size 32"
        )
    return found


def _encoder(tensor: StoredTensor, dtype: str) -> Encoder:
    group = _group(tensor)
    if group is None:
        return DenseEncoder(tensor, dtype)
    return AffineEncoder(tensor, dtype, group)


def _planned(encoder: Encoder) -> PlannedTensor:
    tensor, dtype = encoder.tensor, WORDS[encoder.dtype]
    if isinstance(encoder, AffineEncoder):
        stored = f"affine {tensor.shape.bits} bit, group {encoder.group}, {dtype}"
        return PlannedTensor(tensor.name, stored, exact=True)
    why = why_no_linear(tensor)
    why = why or f"no group of {', '.join(map(str, GROUPS))} divides its blocks and its columns"
    return PlannedTensor(tensor.name, f"dense {dtype}", exact=True, why=why)


def _notes(artifact: Artifact) -> tuple[str, ...]:
    kind = (artifact.checkpoint.config or {}).get("model_type")
    if kind in TRIED:
        return ()
    return (
        f"model_type {kind!r} was not tried with mlx-lm: compare its answers ("
        f"{', '.join(TRIED)} were)",
    )


TARGET = MlxTarget()
