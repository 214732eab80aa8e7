"""An artifact opened for reading: its configuration, manifest and tensors, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.config import QUANT_METHOD, QuantizationConfig
from irq_convert.artifact.manifest import MANIFEST_NAME, read_manifest
from irq_convert.artifact.structure import WAY_OUT, StoredTensor, sort_tensors
from irq_convert.checkpoint.buffers import tensor_bytes
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from irq_convert.checkpoint.writer import ShardWriter
from irq_convert.core.blocks import BlockShape
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.errors import IrqError, UsageError

__all__ = [
    "Artifact",
    "StoredTensor",
    "examine_artifact",
    "open_artifact",
    "read_quantized",
    "write_quantized",
]


@dataclass(frozen=True)
class Artifact:
    """An opened artifact.

    `quantized` and `copied` together are every tensor of the source; `manifest` is None where there
    is none, as in an artifact that was saved again by `save_pretrained`.
    """

    folder: Path
    checkpoint: Checkpoint
    config: QuantizationConfig
    manifest: dict[str, Any] | None
    quantized: tuple[StoredTensor, ...]
    copied: tuple[TensorInfo, ...]

    def in_file_order(self) -> list[StoredTensor | TensorInfo]:
        """Every tensor of the source, as the files have them one after the other."""
        order = {name: at for at, name in enumerate(self.checkpoint.tensors)}
        tensors: list[StoredTensor | TensorInfo] = [*self.quantized, *self.copied]
        return sorted(tensors, key=lambda tensor: order[tensor.name])

    @property
    def weights(self) -> int:
        """Numbers of the source, of any kind."""
        return self.quantized_weights + sum(info.numel for info in self.copied)

    @property
    def quantized_weights(self) -> int:
        return sum(tensor.weights for tensor in self.quantized)

    @property
    def quantized_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.quantized)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a quantized weight, with its share of scales, taus and grids."""
        return 8 * self.quantized_bytes / max(1, self.quantized_weights)


def open_artifact(folder: Path) -> Artifact:
    """Open the artifact in `folder` and check everything that headers and small files can tell.

    Raises `UsageError` when it is no irq artifact, and `IrqError`, naming the tensor or file, when
    it breaks the format (formats/irq-v1.md, sections 1 to 3) or its manifest contradicts it.
    """
    artifact, problems = examine_artifact(folder, find_manifest(folder))
    if problems:
        more = f" ({len(problems) - 1} more: run `irq-convert verify`)" if problems[1:] else ""
        raise IrqError(problems[0] + more)
    return artifact


def find_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, None where there is none; `IrqError` when it is not one."""
    return read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None


def examine_artifact(
    folder: Path, manifest: dict[str, Any] | None
) -> tuple[Artifact, tuple[str, ...]]:
    """Open as `open_artifact` does, but return its problems, one line each.

    Raises all the same for what leaves nothing to examine: no irq artifact, a damaged header, an
    unreadable configuration. Tensors with a problem are not in the artifact's `quantized`.
    """
    config = _read_config(folder)
    checkpoint = open_checkpoint(folder)
    structure = sort_tensors(checkpoint.tensors, config, manifest)
    artifact = Artifact(folder, checkpoint, config, manifest, structure.quantized, structure.copied)
    problems = [
        f'{path.name}: its metadata must say "format": "pt" for transformers to read it: {WAY_OUT}'
        for path, metadata in checkpoint.shard_metadata.items()
        if metadata.get("format") != "pt"
    ]
    if not structure.quantized and not structure.problems:
        problems.append(f"{folder}: config.json says irq, but no tensor is quantized: {WAY_OUT}")
    return artifact, (*problems, *structure.problems)


def _read_config(folder: Path) -> QuantizationConfig:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the folder of an artifact")
    raw = read_json_object(path).get("quantization_config") if path.is_file() else None
    method = raw.get("quant_method") if isinstance(raw, Mapping) else None
    if isinstance(raw, Mapping) and method == QUANT_METHOD:
        return QuantizationConfig.from_dict(raw)
    if not path.is_file():
        found = "there is no config.json"
    elif raw is None:
        found = "its config.json has no quantization_config"
    else:
        found = f"its config.json says quant_method {method!r}"
    if (folder / MANIFEST_NAME).is_file():
        raise IrqError(f"{folder}: holds {MANIFEST_NAME}, but {found}: {WAY_OUT}")
    raise UsageError(
        f"{folder}: not an irq artifact: {found}; make one with `irq-convert quantize`"
    )


def read_quantized(
    reader: TileReader, tensor: StoredTensor, start: int, stop: int
) -> QuantizedTensor:
    """Read rows `start .. stop` of `tensor`, with its leading dimensions flattened to rows.

    `start` must be a multiple of `tensor.shape.row_multiple`, so that the tile begins with a group
    and its grids can be cut out; `stop` is one too, or ends the tile in the middle of a group.
    Raises `ValueError` for other rows, `IrqError` when a file cannot be read.
    """
    parts = {suffix: read_part(reader, tensor, suffix, start, stop) for suffix in tensor.parts}
    return QuantizedTensor(
        codes=parts[""],
        scale=parts["_scale"],
        tau=parts["_tau"],
        scale_grid=parts.get("_scale_grid"),
        tau_grid=parts.get("_tau_grid"),
        cols=tensor.shape.cols,
        codebook=tensor.format.codebook,
        block_size=tensor.format.block_size,
    )


def write_quantized(
    writer: ShardWriter, name: str, shape: BlockShape, start: int, tile: QuantizedTensor
) -> None:
    """Write `tile`, rows from `start` on of tensor `name` of `shape`: twin of `read_quantized`.

    `start` must be a multiple of `shape.row_multiple`. Raises as `ShardWriter.write`.
    """
    group = shape.tile(start).groups
    for suffix, part in tile.parts().items():
        data = tensor_bytes(part.cpu().contiguous())
        first = group if suffix.endswith("_grid") else start
        writer.write(name + suffix, data, first * (len(data) // part.shape[0]))


def read_part(
    reader: TileReader, tensor: StoredTensor, suffix: str, start: int, stop: int
) -> torch.Tensor:
    """Part `suffix` for rows `start .. stop`, `[rows, ...]`; of a grid the groups of those rows.

    Raises as `read_quantized`.
    """
    shape, info = tensor.shape, tensor.parts[suffix]
    if not 0 <= start <= stop <= shape.rows or start % shape.row_multiple:
        raise ValueError(
            f"{tensor.name} has {shape.rows} rows, to be read from a multiple of "
            f"{shape.row_multiple} on, not {start}:{stop}"
        )
    if suffix.endswith("_grid"):
        return reader.read_rows(info, shape.tile(start).groups, shape.tile(stop).groups)
    return reader.read_rows(flat(info, shape.rows), start, stop)


def flat(info: TensorInfo, rows: int) -> TensorInfo:
    """`info` as a matrix of `rows` rows: its leading dimensions, or none, made one."""
    return replace(info, shape=(rows, info.shape[-1]))
