"""The plan of a conversion, from headers alone: every tensor's fate, every output byte."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from irq_convert.artifact.config import (
    ModuleFormat,
    QuantizationConfig,
    module_name,
)
from irq_convert.artifact.head import untied_config
from irq_convert.artifact.manifest import manifest_limit, manifest_room
from irq_convert.artifact.results import MARKS
from irq_convert.artifact.structure import part_specs
from irq_convert.checkpoint.float_dtypes import FLOATS
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.planned_folder import PlannedFolder, plan_folder
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.checkpoint.writer import TensorSpec
from irq_convert.core.blocks import BlockShape
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError
from irq_convert.hf.linears import Linears, find_linears
from irq_convert.hf.usable import refuse_unusable
from irq_convert.jobs.common.expressions import last_match
from irq_convert.jobs.quantize.made_files import MadeFiles, make_files
from irq_convert.jobs.quantize.options import QuantizeOptions, codebook_name
from irq_convert.jobs.quantize.refusals import (
    check_copied,
    check_expressions,
    check_names,
)
from irq_convert.version import PRODUCER

KEPT = "kept by --keep"
LEFT = "left as they are by the target"


@dataclass(frozen=True)
class TensorPlan:
    """One source tensor: quantized by `spec`, or copied when `spec` is None.

    `transposed`: its inputs are the last dimension but one, and it is stored with the two swapped.
    """

    info: TensorInfo
    spec: QuantSpec | None
    transposed: bool = False

    @property
    def name(self) -> str:
        return self.info.name

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
class QuantizePlan:
    """Everything that is known before any weight is read.

    `folder` holds all files but the manifest, whose text depends on the results. `kept`: how many
    numbers are copied, by the reason in words. `notes` are remarks that a person should see.
    `tables` are the quantized tensors that are embeddings or heads, which no layer holds.
    """

    checkpoint: Checkpoint
    folder: PlannedFolder[TensorPlan]
    config: QuantizationConfig
    decided_by: str
    kept: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tables: frozenset[str] = frozenset()
    remake: Callable[[Mapping[str, QuantSpec | None]], QuantizePlan] | None = field(
        default=None, repr=False
    )

    @property
    def quantized(self) -> list[TensorPlan]:
        return [tensor for tensor in self.folder.tensors if tensor.spec is not None]

    @property
    def weights(self) -> int:
        """Numbers in the source, of any kind."""
        return sum(tensor.info.numel for tensor in self.folder.tensors)

    @property
    def quantized_weights(self) -> int:
        return sum(tensor.info.numel for tensor in self.quantized)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a quantized weight with its share of scales, taus and grids."""
        return 8 * sum(t.nbytes for t in self.quantized) / max(1, self.quantized_weights)

    @property
    def bytes_in(self) -> int:
        """Size of what is read: the files of the weights and those beside them."""
        return self.checkpoint.file_bytes + sum(self.folder.carried_sizes.values())

    @property
    def bytes_needed(self) -> int:
        """Room to ask for: all files and what the manifest takes at most."""
        names = (tensor.name for tensor in self.quantized)
        files = len(self.folder.carried) + len(self.folder.shards)
        return self.folder.bytes_out + manifest_room(names, files)

    @property
    def bytes_at_most(self) -> int:
        """What the artifact takes: all files, and a manifest at its longest."""
        names = (tensor.name for tensor in self.quantized)
        return self.folder.bytes_out + manifest_limit(names, len(self.folder.files))


def plan_quantize(
    checkpoint: Checkpoint, options: QuantizeOptions, *, shards_only: bool = False
) -> QuantizePlan:
    """Decide the fate of every tensor of `checkpoint`.

    `shards_only` is for a process that writes no other file: what takes time to make is left out.
    Raises `IrqError` for a source that is already quantized or no whole model of its class, a
    linear weight in a dtype that is not a float of 16 bits or more, a name that an output would
    collide with, or a model without linears; `UsageError` for an expression in `options` that
    matches nothing.
    """
    made = make_files(checkpoint, tokenizer=not shards_only)
    refuse_unusable(checkpoint)
    linears = find_linears(
        checkpoint.config, checkpoint.tensors, options.include_towers, options.include_embeddings
    )
    check_expressions(options, linears.tensors, checkpoint.tensors)
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
    quantized = {tensor.name: None for tensor in tensors if tensor.spec}
    check_names(checkpoint.tensors, quantized)
    check_copied(checkpoint.tensors, quantized)
    return _assemble(checkpoint, tensors, linears, made, options)


def replan(plan: QuantizePlan, specs: Mapping[str, QuantSpec | None]) -> QuantizePlan:
    """`plan` with other `specs` for the weights named, None to leave one as it is."""
    assert plan.remake is not None
    return plan.remake(specs)


def _assemble(
    checkpoint: Checkpoint,
    tensors: Sequence[TensorPlan],
    linears: Linears,
    made: MadeFiles,
    options: QuantizeOptions,
    left: Collection[str] = (),
) -> QuantizePlan:
    """The folder that holds `tensors`, and its configuration; a target has `left` some dense."""
    quantized = {tensor.name for tensor in tensors if tensor.spec}
    kept = sorted(linears.tensors - quantized)
    config = _config(tensors, (*linears.modules_kept, *_modules_of(kept, linears)), options)
    tables = frozenset(linears.tables) & quantized
    source_config = checkpoint.config or {}
    if linears.apart and tables:
        source_config = untied_config(source_config)
    folder = plan_folder(
        tensors,
        options.max_shard_bytes,
        checkpoint,
        {**source_config, "quantization_config": config.to_dict()},
        replaced=(*MARKS, *made.replaced),
        made=made.files,
    )

    def remake(specs: Mapping[str, QuantSpec | None]) -> QuantizePlan:
        others = [replace(each, spec=specs.get(each.name, each.spec)) for each in tensors]
        left = frozenset(name for name, spec in specs.items() if spec is None)
        return _assemble(checkpoint, others, linears, made, options, left)

    return QuantizePlan(
        checkpoint,
        folder,
        config,
        linears.decided_by,
        _weights_kept(tensors, linears, left),
        (*made.notes, *(f"{name} stays dense: {why}" for name, why in linears.left.items())),
        tables,
        remake,
    )


def _modules_of(kept: Sequence[str], linears: Linears) -> Iterator[str]:
    """Modules of weights that are kept, and those that share one and have no tensor themselves."""
    for tensor in kept:
        yield module_name(tensor)
        shared = linears.tables.get(tensor, ())
        yield from shared if len(shared) > 1 else ()


def _weights_kept(
    tensors: Sequence[TensorPlan], linears: Linears, left: Collection[str]
) -> dict[str, int]:
    """Numbers that are copied, by the reason, the most first."""
    found: dict[str, int] = {}
    for tensor in tensors:
        if tensor.spec is None:
            asked = tensor.info.name in linears.tensors
            why = KEPT if asked else linears.why_kept(tensor.info.name)
            if tensor.name in left:
                why = LEFT
            found[why] = found.get(why, 0) + tensor.info.numel
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _spec_of(info: TensorInfo, options: QuantizeOptions) -> QuantSpec | None:
    """How a linear weight is quantized; None when it is to be kept."""
    if any(re.search(pattern, info.name) for pattern in options.keep):
        return None
    if info.dtype not in FLOATS:
        raise IrqError(
            f"{info.name} {list(info.shape)} in {info.shard.name} is {info.dtype}: the source is "
            "already quantized; give the original model, in float32, bfloat16 or float16"
        )
    if len(info.shape) not in (2, 3):
        raise IrqError(f"{info.name} {list(info.shape)} is not a matrix: keep it with --keep")
    spec, bits = options.spec, last_match(options.bits_for, info.name)
    return spec if bits is None else replace(spec, codebook=codebook_name(spec.book.kind, bits))


def _format(spec: QuantSpec, transposed: bool = False) -> ModuleFormat:
    return ModuleFormat(
        spec.codebook, spec.block_size, tau_dtype=spec.tau_dtype, transposed=transposed
    )


def _config(
    tensors: Sequence[TensorPlan], kept: Sequence[str], options: QuantizeOptions
) -> QuantizationConfig:
    common = Counter(_format(tensor.spec) for tensor in tensors if tensor.spec)
    # What a mix has most of; else the options' own, which every reader has seen so far.
    default = _format(options.spec)
    if options.target is not None and common:
        default = max(common, key=lambda each: (common[each], str(each)))
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
    meta = {"producer": PRODUCER}
    return QuantizationConfig(default, tuple(sorted(set(kept))), overrides, meta)
