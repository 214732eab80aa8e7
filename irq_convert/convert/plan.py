"""The plan of a conversion, from headers alone: every tensor's fate, every output byte."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from irq_convert import __version__
from irq_convert.artifact.config import (
    ModuleFormat,
    QuantizationConfig,
    module_name,
)
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.structure import part_specs
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.shards import INDEX_NAME, build_index, plan_shards, shard_name
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.checkpoint.system import os_errors
from irq_convert.checkpoint.writer import TensorSpec, build_header
from irq_convert.convert.linears import Linears, find_linears
from irq_convert.convert.options import ConvertOptions, codebook_name
from irq_convert.convert.refusals import (
    check_copied,
    check_expressions,
    check_names,
    refuse_quantized,
)
from irq_convert.core.blocks import BlockShape
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError

CONFIG_NAME = "config.json"
REPLACED_FILES = (CONFIG_NAME, MANIFEST_NAME, INDEX_NAME)
KEPT = "kept by --keep"
SOURCE_DTYPES = ("F32", "BF16", "F16", "F64")
_MANIFEST_BASE = 1 << 16
_MANIFEST_ENTRY = 1 << 10


@dataclass(frozen=True)
class TensorPlan:
    """One source tensor: quantized by `spec`, or copied when `spec` is None.

    `transposed`: its inputs are the last dimension but one, and it is stored with the two swapped.
    """

    info: TensorInfo
    spec: QuantSpec | None
    transposed: bool = False

    @property
    def shape(self) -> BlockShape:
        """Block geometry of a quantized tensor."""
        assert self.spec is not None
        cols = self.info.shape[-2 if self.transposed else -1]
        rows = self.info.numel // max(1, cols)
        return BlockShape(rows, cols, self.spec.block_size, self.spec.bits)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The stored tensors (specification, section 3)."""
        if self.spec is None:
            return (TensorSpec(self.info.name, self.info.dtype, self.info.shape),)
        stored = _format(self.spec, self.transposed)
        return tuple(part_specs(self.info.name, self.info.shape, stored).values())

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class ShardPlan:
    """One output file and the tensors whose parts it holds."""

    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def outputs(self) -> list[TensorSpec]:
        return [spec for tensor in self.tensors for spec in tensor.outputs]

    @property
    def nbytes(self) -> int:
        """The exact size of the file."""
        header = len(build_header(self.outputs, {"format": "pt"}))
        return header + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that is known before any weight is read.

    `kept`: how many numbers are copied, by the reason in words.
    """

    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    config: QuantizationConfig
    decided_by: str
    kept: Mapping[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> list[TensorPlan]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def quantized(self) -> list[TensorPlan]:
        return [tensor for tensor in self.tensors if tensor.spec is not None]

    @property
    def weights(self) -> int:
        """Numbers in the source, of any kind."""
        return sum(tensor.info.numel for tensor in self.tensors)

    @property
    def quantized_weights(self) -> int:
        return sum(tensor.info.numel for tensor in self.quantized)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a quantized weight with its share of scales, taus and grids."""
        return 8 * sum(t.nbytes for t in self.quantized) / max(1, self.quantized_weights)

    @property
    def shard_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def carried_files(self) -> tuple[str, ...]:
        """Files of the source that are copied unchanged."""
        return tuple(n for n in self.checkpoint.other_files if n not in REPLACED_FILES)

    @property
    def carried_bytes(self) -> int:
        folder = self.checkpoint.folder
        with os_errors("look at its files", folder):
            return sum((folder / name).stat().st_size for name in self.carried_files)

    @property
    def bytes_in(self) -> int:
        """Size of what is read: all tensors and the files beside them."""
        return self.checkpoint.nbytes + self.carried_bytes

    def config_json(self) -> dict[str, object]:
        """The artifact's config.json."""
        return {**(self.checkpoint.config or {}), "quantization_config": self.config.to_dict()}

    def index_json(self) -> dict[str, object] | None:
        """The index, where there is more than one shard."""
        if len(self.shards) == 1:
            return None
        weight_map = {spec.name: shard.name for shard in self.shards for spec in shard.outputs}
        return build_index(weight_map, sum(tensor.nbytes for tensor in self.tensors))

    @property
    def documents(self) -> dict[str, bytes]:
        """The JSON files, by name.

        Written as transformers writes them, in ASCII, and with the Infinity that some
        configurations hold: strict JSON has none, but they mean it.
        """
        index = self.index_json()
        found = {CONFIG_NAME: self.config_json()} | ({INDEX_NAME: index} if index else {})
        return {name: f"{json.dumps(doc, indent=2)}\n".encode() for name, doc in found.items()}

    @property
    def bytes_out(self) -> int:
        """Size of the artifact without its manifest, whose text depends on the results."""
        text = sum(map(len, self.documents.values()))
        return self.shard_bytes + self.carried_bytes + text

    @property
    def bytes_needed(self) -> int:
        """Room to ask for: `bytes_out` and what the manifest takes at most."""
        entries = len(self.quantized) + len(self.carried_files) + len(self.shards)
        names = sum(len(json.dumps(tensor.info.name)) for tensor in self.quantized)
        return self.bytes_out + _MANIFEST_BASE + entries * _MANIFEST_ENTRY + names


def make_plan(checkpoint: Checkpoint, options: ConvertOptions) -> ConversionPlan:
    """Decide the fate of every tensor of `checkpoint`.

    Raises `IrqError` for a source that is already quantized, a linear weight in a dtype that is
    not a float of 16 bits or more, a name that an output would collide with, or a model without
    linears; `UsageError` for an expression in `options` that matches nothing.
    """
    refuse_quantized(checkpoint)
    linears = find_linears(checkpoint, options.include_towers)
    check_expressions(options, linears.tensors, checkpoint)
    tensors = [
        TensorPlan(
            info,
            _spec_of(info, options) if name in linears.tensors else None,
            name in linears.transposed,
        )
        for name, info in checkpoint.tensors.items()
    ]
    if not any(tensor.spec for tensor in tensors):
        raise IrqError(
            f"{checkpoint.folder}: nothing to quantize: no linear layer found by "
            f"{linears.decided_by}{' is left after --keep' if options.keep else ''}"
        )
    check_names(tensors)
    check_copied(tensors)
    kept = sorted(linears.tensors - {t.info.name for t in tensors if t.spec})
    config = _config(tensors, (*linears.modules_kept, *map(module_name, kept)), options)
    by_name = {tensor.info.name: tensor for tensor in tensors}
    sizes = [(tensor.info.name, tensor.nbytes) for tensor in tensors]
    parts = plan_shards(sizes, options.max_shard_bytes)
    shards = tuple(
        ShardPlan(shard_name(number, len(parts)), tuple(by_name[name] for name in names))
        for number, names in enumerate(parts, start=1)
    )
    return ConversionPlan(
        checkpoint, shards, config, linears.decided_by, _weights_kept(tensors, linears)
    )


def _weights_kept(tensors: Sequence[TensorPlan], linears: Linears) -> dict[str, int]:
    """Numbers that are copied, by the reason, the most first."""
    found: dict[str, int] = {}
    for tensor in tensors:
        if tensor.spec is None:
            asked = tensor.info.name in linears.tensors
            why = KEPT if asked else linears.why_kept(tensor.info.name)
            found[why] = found.get(why, 0) + tensor.info.numel
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _spec_of(info: TensorInfo, options: ConvertOptions) -> QuantSpec | None:
    """How a linear weight is quantized; None when it is to be kept."""
    if any(re.search(pattern, info.name) for pattern in options.keep):
        return None
    if info.dtype not in SOURCE_DTYPES:
        raise IrqError(
            f"{info.name} {list(info.shape)} in {info.shard.name} is {info.dtype}: the source is "
            "already quantized; give the original model, in float32, bfloat16 or float16"
        )
    if len(info.shape) not in (2, 3):
        raise IrqError(f"{info.name} {list(info.shape)} is not a matrix: keep it with --keep")
    spec = options.spec
    for pattern, bits in options.bits_for:
        if re.search(pattern, info.name):
            spec = replace(spec, codebook=codebook_name(spec.book.kind, bits))
    return spec


def _format(spec: QuantSpec, transposed: bool = False) -> ModuleFormat:
    return ModuleFormat(
        spec.codebook, spec.block_size, tau_dtype=spec.tau_dtype, transposed=transposed
    )


def _config(
    tensors: Sequence[TensorPlan], kept: Sequence[str], options: ConvertOptions
) -> QuantizationConfig:
    default = _format(options.spec)
    overrides = {}
    for tensor in tensors:
        if tensor.spec is None:
            continue
        own = _format(tensor.spec, tensor.transposed)
        shape = tensor.shape
        if own.columns_of(shape.row_bytes) != shape.cols:
            own = replace(own, columns=shape.cols)
        if own != default:
            overrides[module_name(tensor.info.name)] = own
    meta = {"producer": f"irq-convert {__version__}"}
    return QuantizationConfig(default, tuple(sorted(set(kept))), overrides, meta)
