"""The plan of a conversion, from headers alone: every tensor's fate, every output byte."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from irq_convert import __version__
from irq_convert.artifact.config import (
    PART_SUFFIXES,
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
from irq_convert.convert.linears import find_linears
from irq_convert.convert.options import ConvertOptions, codebook_name
from irq_convert.core.blocks import BlockShape
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError

CONFIG_NAME = "config.json"
REPLACED_FILES = (CONFIG_NAME, MANIFEST_NAME, INDEX_NAME)
SOURCE_DTYPES = ("F32", "BF16", "F16", "F64")
_MANIFEST_BASE = 1 << 16
_MANIFEST_ENTRY = 1 << 10


@dataclass(frozen=True)
class TensorPlan:
    """One source tensor: quantized by `spec`, or copied when `spec` is None."""

    info: TensorInfo
    spec: QuantSpec | None

    @property
    def shape(self) -> BlockShape:
        """Block geometry of a quantized tensor."""
        assert self.spec is not None
        rows, cols = self.info.shape
        return BlockShape(rows, cols, self.spec.block_size, self.spec.bits)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The stored tensors (specification, section 3)."""
        if self.spec is None:
            return (TensorSpec(self.info.name, self.info.dtype, self.info.shape),)
        stored = _format(self.spec)
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
    """Everything that is known before any weight is read."""

    checkpoint: Checkpoint
    shards: tuple[ShardPlan, ...]
    config: QuantizationConfig
    decided_by: str

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
    _refuse_quantized(checkpoint)
    linears = find_linears(checkpoint)
    _check_expressions(options, linears.tensors, checkpoint)
    tensors = [
        TensorPlan(info, _spec_of(info, options) if name in linears.tensors else None)
        for name, info in checkpoint.tensors.items()
    ]
    if not any(tensor.spec for tensor in tensors):
        raise IrqError(
            f"{checkpoint.folder}: nothing to quantize: no linear layer found by "
            f"{linears.decided_by}{' is left after --keep' if options.keep else ''}"
        )
    _check_names(tensors)
    _check_copied(tensors)
    kept = sorted(linears.tensors - {t.info.name for t in tensors if t.spec})
    config = _config(tensors, (*linears.modules_kept, *map(module_name, kept)), options)
    by_name = {tensor.info.name: tensor for tensor in tensors}
    sizes = [(tensor.info.name, tensor.nbytes) for tensor in tensors]
    parts = plan_shards(sizes, options.max_shard_bytes)
    shards = tuple(
        ShardPlan(shard_name(number, len(parts)), tuple(by_name[name] for name in names))
        for number, names in enumerate(parts, start=1)
    )
    return ConversionPlan(checkpoint, shards, config, linears.decided_by)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    config = checkpoint.config or {}
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for found in filter(None, (part.get("quantization_config") for part in parts)):
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise IrqError(
            f"{checkpoint.folder}: already quantized (quant_method {method!r}); give the original "
            "model, in float32, bfloat16 or float16"
        )


def _check_expressions(
    options: ConvertOptions, names: frozenset[str], checkpoint: Checkpoint
) -> None:
    for option, patterns in (
        ("--keep", options.keep),
        ("--bits-for", tuple(pattern for pattern, _ in options.bits_for)),
    ):
        for pattern in patterns:
            if any(re.search(pattern, name) for name in names):
                continue
            elsewhere = [name for name in checkpoint.tensors if re.search(pattern, name)]
            hint = f"; {elsewhere[0]} is copied in any case" if elsewhere else ""
            example = min(names) if names else "none"
            raise UsageError(
                f"{option} {pattern!r} matches no tensor that would be quantized{hint} "
                f"(they are named like {example})"
            )


def _spec_of(info: TensorInfo, options: ConvertOptions) -> QuantSpec | None:
    """How a linear weight is quantized; None when it is to be kept."""
    if any(re.search(pattern, info.name) for pattern in options.keep):
        return None
    if info.dtype not in SOURCE_DTYPES:
        raise IrqError(
            f"{info.name} {list(info.shape)} in {info.shard.name} is {info.dtype}: the source is "
            "already quantized; give the original model, in float32, bfloat16 or float16"
        )
    if len(info.shape) != 2:
        raise IrqError(f"{info.name} {list(info.shape)} is not a matrix: keep it with --keep")
    spec = options.spec
    for pattern, bits in options.bits_for:
        if re.search(pattern, info.name):
            spec = replace(spec, codebook=codebook_name(spec.book.kind, bits))
    return spec


def _check_names(tensors: Sequence[TensorPlan]) -> None:
    """No source tensor may bear a name that means a part of a quantized one."""
    names = {tensor.info.name for tensor in tensors}
    for tensor in tensors:
        for suffix in PART_SUFFIXES:
            if tensor.spec and tensor.info.name + suffix in names:
                raise IrqError(
                    f"{tensor.info.name}{suffix} exists in the source, so {tensor.info.name} "
                    "cannot be quantized (is the source quantized already?): keep it with --keep"
                )


def _check_copied(tensors: Sequence[TensorPlan]) -> None:
    """A copied tensor of bytes must not look like the codes of a quantized one."""
    names = {tensor.info.name for tensor in tensors}
    for tensor in tensors:
        if tensor.spec is None and tensor.info.dtype == "U8":
            for suffix in PART_SUFFIXES:
                if tensor.info.name + suffix in names:
                    raise IrqError(
                        f"{tensor.info.name} is U8 and has {tensor.info.name}{suffix} beside it: "
                        "the source is already quantized; give the original model"
                    )


def _format(spec: QuantSpec) -> ModuleFormat:
    return ModuleFormat(spec.codebook, spec.block_size, tau_dtype=spec.tau_dtype)


def _config(
    tensors: Sequence[TensorPlan], kept: Sequence[str], options: ConvertOptions
) -> QuantizationConfig:
    default = _format(options.spec)
    overrides = {}
    for tensor in tensors:
        if tensor.spec is None:
            continue
        own = _format(tensor.spec)
        shape = tensor.shape
        if own.columns_of(shape.row_bytes) != shape.cols:
            own = replace(own, columns=shape.cols)
        if own != default:
            overrides[module_name(tensor.info.name)] = own
    meta = {"producer": f"irq-convert {__version__}"}
    return QuantizationConfig(default, tuple(sorted(set(kept))), overrides, meta)
