"""The plan of a merge, from headers alone: what becomes of every tensor, and every output byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from irq_convert.artifact.adapter_statistics import StoredStatistics
from irq_convert.artifact.adapter_tokens import StoredTokens
from irq_convert.artifact.config import ModuleFormat, QuantizationConfig, module_name
from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.dense import dense_config, dense_dtype
from irq_convert.artifact.head import untied_config
from irq_convert.artifact.manifest import manifest_room
from irq_convert.artifact.results import MARKS
from irq_convert.artifact.structure import StoredTensor, part_specs
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.planned_folder import PlannedFolder, plan_folder
from irq_convert.checkpoint.writer import TensorSpec
from irq_convert.core.blocks import BlockShape
from irq_convert.core.codebook import get_codebook
from irq_convert.core.spec import MAX_REFINE, OBJECTIVES, QuantSpec
from irq_convert.core.statistic_dtypes import UINT8
from irq_convert.jobs.merge.match import Match
from irq_convert.jobs.merge.match_layers import Adapted
from irq_convert.jobs.merge.options import MergeOptions, MergeTo
from irq_convert.version import PRODUCER


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the source: where it comes from, what changes it, how it is written.

    `base` is the artifact's, quantized or copied; `saved` takes its place, `adapted` is added to
    it, `tokens` take the place of some of its rows, `statistics` move its scale and tau. `target`
    is the format of a quantized result, or the dtype of a dense one; `again` says how it is
    quantized again, None where it is not.
    """

    name: str
    base: StoredTensor | TensorInfo
    adapted: Adapted | None
    saved: TensorInfo | None
    target: ModuleFormat | str
    again: QuantSpec | None = None
    tokens: StoredTokens | None = None
    statistics: StoredStatistics | None = None

    @property
    def moves_scale(self) -> bool:
        """Whether a result of the same codes has scales of its own."""
        return self.statistics is not None and self.statistics.scale is not None

    @property
    def moves_tau(self) -> bool:
        """Whether a result of the same codes has taus of its own."""
        pooled = self.adapted is not None and self.adapted.block_size is not None
        return pooled or (self.statistics is not None and self.statistics.tau is not None)

    @property
    def changed(self) -> bool:
        """Whether the adapter has a layer for it."""
        return self.adapted is not None or self.statistics is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """As the source has it, or with the rows of a larger vocabulary."""
        base = self.saved or self.base
        return base.source_shape if isinstance(base, StoredTensor) else base.shape

    @property
    def transposed(self) -> bool:
        """Whether the artifact stores the transpose of what a dense file has."""
        return isinstance(self.base, StoredTensor) and self.base.format.transposed

    @property
    def blocks(self) -> BlockShape:
        """Geometry of a quantized tensor as the artifact has it."""
        assert isinstance(self.base, StoredTensor)
        return self.base.shape

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What is stored for it."""
        if isinstance(self.target, ModuleFormat):
            return tuple(part_specs(self.name, self.shape, self.target).values())
        return (TensorSpec(self.name, self.target, self.shape),)

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class MergePlan:
    """Everything that is known before any weight is read. `config` is None for a dense result.

    `folder` holds all files but manifest or note.
    """

    artifact: Artifact
    folder: PlannedFolder[MergedTensor]
    config: QuantizationConfig | None
    options: MergeOptions

    @property
    def tensors(self) -> list[MergedTensor]:
        return self.folder.tensors

    @property
    def rounded(self) -> set[str]:
        """Dtypes of dense tensors of the result whose numbers are not those of the artifact."""
        return {
            tensor.target
            for tensor in self.tensors
            if isinstance(tensor.target, str)
            and (
                tensor.changed
                or tensor.saved
                or tensor.tokens
                or tensor.target != getattr(tensor.base, "dtype", None)
            )
        }

    @property
    def bytes_needed(self) -> int:
        """Room to ask for: all files, and a manifest at its longest."""
        names = (tensor.name for tensor in self.tensors)
        files = len(self.folder.shards) + len(self.folder.carried)
        return self.folder.bytes_out + manifest_room(names, files)


def plan_merge(artifact: Artifact, match: Match, options: MergeOptions) -> MergePlan:
    """Decide what becomes of every tensor of `artifact`."""
    bases = {tensor.name: tensor for tensor in artifact.in_file_order()}
    bases |= {name: bases[base] for name, base in match.added.items()}
    tensors = [_tensor(artifact, name, base, match, options) for name, base in bases.items()]
    config = None
    if options.to == MergeTo.IRQ:
        config = _config(artifact.config, tensors, map(module_name, match.added))
    folder = plan_folder(
        tensors,
        options.max_shard_bytes,
        artifact.checkpoint,
        _config_json(artifact, config, match, options),
        replaced=MARKS,
    )
    return MergePlan(artifact, folder, config, options)


def _config_json(
    artifact: Artifact, config: QuantizationConfig | None, match: Match, options: MergeOptions
) -> dict[str, Any]:
    """config.json of the result."""
    found = dict(artifact.checkpoint.config or {})
    if config is None:
        found = dense_config(artifact, options.dtype)
    if match.vocabulary is not None:
        found = match.vocabulary.config(found)
    if match.untied:
        found = untied_config(found)
    return found if config is None else {**found, "quantization_config": config.to_dict()}


def _tensor(
    artifact: Artifact,
    name: str,
    base: StoredTensor | TensorInfo,
    match: Match,
    options: MergeOptions,
) -> MergedTensor:
    adapted, saved = match.layers.get(name), match.saved.get(name)
    again = None
    if options.to == MergeTo.IRQ:
        again = _again(base, adapted, requantize_settings(artifact, options))
    target = _target(artifact, base, again, options)
    under, tokens = match.bases.get(name, base), match.tokens.get(name)
    moves = match.statistics.get(name)
    made = MergedTensor(name, under, adapted, saved, target, again, tokens, moves)
    if isinstance(target, ModuleFormat) and again is None:
        return replace(made, target=_restated(target, made, options))
    return made


def _restated(base: ModuleFormat, tensor: MergedTensor, options: MergeOptions) -> ModuleFormat:
    """The format of a tensor whose codes stay."""
    if tensor.moves_tau:
        base = replace(base, tau_dtype=options.stored.value)
    if tensor.moves_scale:
        base = replace(base, scale_dtype=options.stored.value)
    return base


def _target(
    artifact: Artifact,
    base: StoredTensor | TensorInfo,
    again: QuantSpec | None,
    options: MergeOptions,
) -> ModuleFormat | str:
    if options.to == MergeTo.DENSE:
        return dense_dtype(artifact, base, options.dtype)
    if isinstance(base, StoredTensor):
        if again is None:
            return base.format
        return replace(base.format, scale_dtype=UINT8.name, tau_dtype=again.tau_dtype)
    return base.dtype


def requantize_settings(artifact: Artifact, options: MergeOptions) -> dict[str, Any]:
    """What tensors are quantized again with: as the artifact was, unless told otherwise.

    Zero points that were integers stay integers, so that the result exports as its base does.
    """
    noted = (artifact.manifest or {"options": {}})["options"]
    objective, refine = noted.get("objective"), noted.get("refine")
    whole = type(refine) is int and 0 <= refine <= MAX_REFINE and options.objective is None
    return {
        "objective": options.objective or (objective if objective in OBJECTIVES else "auto"),
        "refine": refine if whole else 0,
        "zero_point": "integer" if noted.get("zero_point") == "integer" else "float",
    }


def _again(
    base: StoredTensor | TensorInfo, adapted: Adapted | None, means: Mapping[str, Any]
) -> QuantSpec | None:
    if not isinstance(base, StoredTensor) or adapted is None or adapted.block_size is not None:
        return None
    uniform = get_codebook(base.format.codebook).uniform
    own = {} if uniform else {"zero_point": "float"}
    return QuantSpec(base.format.codebook, base.format.block_size, **{**means, **own})


def _config(
    base: QuantizationConfig, tensors: list[MergedTensor], dense: Iterable[str]
) -> QuantizationConfig:
    """The configuration that is true of the result: a common tau dtype becomes the default's.

    `dense` are modules that the artifact did not have.
    """
    formats = {
        module_name(tensor.name): tensor.target
        for tensor in tensors
        if isinstance(tensor.target, ModuleFormat)
    }
    taus = {fmt.tau_dtype for fmt in formats.values()}
    default = replace(base.default, tau_dtype=taus.pop()) if len(taus) == 1 else base.default
    overrides = {name: fmt for name, fmt in formats.items() if fmt != default}
    meta = {**base.meta, "producer": PRODUCER}
    kept = (*base.modules_to_not_convert, *dense)
    return QuantizationConfig(default, tuple(dict.fromkeys(kept)), overrides, meta)
