"""The plan of a merge, from headers alone: what becomes of every tensor, and every output byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from irq_convert import __version__
from irq_convert.artifact.config import ModuleFormat, QuantizationConfig, module_name
from irq_convert.artifact.contents import Artifact
from irq_convert.artifact.dense import dense_config, dense_dtype
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.structure import StoredTensor, part_specs
from irq_convert.checkpoint.header import TensorInfo
from irq_convert.checkpoint.shards import INDEX_NAME, build_index, plan_shards, shard_name
from irq_convert.checkpoint.system import os_errors
from irq_convert.checkpoint.writer import TensorSpec, build_header
from irq_convert.core.blocks import BlockShape
from irq_convert.core.codebook import get_codebook
from irq_convert.core.spec import MAX_REFINE, OBJECTIVES, QuantSpec
from irq_convert.merge.match import Adapted, Match
from irq_convert.merge.options import MergeOptions, Target

CONFIG_NAME = "config.json"
MERGE_NAME = "irq_merge.json"
REPLACED_FILES = (CONFIG_NAME, MANIFEST_NAME, INDEX_NAME, MERGE_NAME)


@dataclass(frozen=True)
class Job:
    """One tensor of the source: where it comes from, what changes it, how it is written.

    `base` is the artifact's, quantized or copied; `saved` takes its place, `adapted` is added to
    it. `target` is the format of a quantized result, or the dtype of a dense one; `again` says how
    it is quantized again, None where it is not.
    """

    name: str
    base: StoredTensor | TensorInfo
    adapted: Adapted | None
    saved: TensorInfo | None
    target: ModuleFormat | str
    again: QuantSpec | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As the source has it."""
        base = self.base
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
class Shard:
    """One output file."""

    name: str
    jobs: tuple[Job, ...]

    @property
    def outputs(self) -> list[TensorSpec]:
        return [spec for job in self.jobs for spec in job.outputs]

    @property
    def nbytes(self) -> int:
        """The exact size of the file."""
        header = len(build_header(self.outputs, {"format": "pt"}))
        return header + sum(job.nbytes for job in self.jobs)


@dataclass(frozen=True)
class MergePlan:
    """Everything that is known before any weight is read. `config` is None for a dense result."""

    artifact: Artifact
    shards: tuple[Shard, ...]
    config: QuantizationConfig | None
    options: MergeOptions

    @property
    def jobs(self) -> list[Job]:
        return [job for shard in self.shards for job in shard.jobs]

    @property
    def rounded(self) -> set[str]:
        """Dtypes of dense tensors of the result whose numbers are not those of the artifact."""
        return {
            job.target
            for job in self.jobs
            if isinstance(job.target, str)
            and (job.adapted or job.saved or job.target != getattr(job.base, "dtype", None))
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def carried_files(self) -> tuple[str, ...]:
        """Files of the artifact that are copied unchanged."""
        names = self.artifact.checkpoint.other_files
        return tuple(name for name in names if name not in REPLACED_FILES)

    @property
    def carried_bytes(self) -> int:
        folder = self.artifact.folder
        with os_errors("look at its files", folder):
            return sum((folder / name).stat().st_size for name in self.carried_files)

    @property
    def documents(self) -> dict[str, bytes]:
        """config.json and the index, as transformers writes them."""
        found = {CONFIG_NAME: self.config_json()}
        if len(self.shards) > 1:
            weight_map = {spec.name: s.name for s in self.shards for spec in s.outputs}
            found[INDEX_NAME] = build_index(weight_map, self.nbytes)
        return {name: f"{json.dumps(doc, indent=2)}\n".encode() for name, doc in found.items()}

    def config_json(self) -> dict[str, Any]:
        """The result's config.json."""
        if self.config is None:
            return dense_config(self.artifact, self.options.dtype)
        config = self.artifact.checkpoint.config or {}
        return {**config, "quantization_config": self.config.to_dict()}

    @property
    def bytes_out(self) -> int:
        """Size of the result without its manifest."""
        text = sum(map(len, self.documents.values()))
        return sum(shard.nbytes for shard in self.shards) + self.carried_bytes + text

    @property
    def bytes_needed(self) -> int:
        """Room to ask for: `bytes_out` and a manifest at its longest."""
        names = sum(len(json.dumps(job.name)) for job in self.jobs)
        entries = len(self.jobs) + len(self.shards) + len(self.carried_files)
        return self.bytes_out + (1 << 16) + (entries << 10) + names


def make_plan(artifact: Artifact, match: Match, options: MergeOptions) -> MergePlan:
    """Decide what becomes of every tensor of `artifact`."""
    order = {name: at for at, name in enumerate(artifact.checkpoint.tensors)}
    tensors: list[StoredTensor | TensorInfo] = [*artifact.quantized, *artifact.copied]
    ordered = sorted(tensors, key=lambda base: order[base.name])
    jobs = [_job(artifact, base, match, options) for base in ordered]
    by_name = {job.name: job for job in jobs}
    parts = plan_shards([(job.name, job.nbytes) for job in jobs], options.max_shard_bytes)
    shards = tuple(
        Shard(shard_name(number, len(parts)), tuple(by_name[name] for name in names))
        for number, names in enumerate(parts, start=1)
    )
    config = _config(artifact.config, jobs) if options.to == Target.IRQ else None
    return MergePlan(artifact, shards, config, options)


def _job(
    artifact: Artifact, base: StoredTensor | TensorInfo, match: Match, options: MergeOptions
) -> Job:
    adapted, saved = match.layers.get(base.name), match.saved.get(base.name)
    again = None
    if options.to == Target.IRQ:
        again = _again(base, adapted, noted_means(artifact, options))
    target = _target(artifact, base, adapted, again, options)
    return Job(base.name, base, adapted, saved, target, again)


def _target(
    artifact: Artifact,
    base: StoredTensor | TensorInfo,
    adapted: Adapted | None,
    again: QuantSpec | None,
    options: MergeOptions,
) -> ModuleFormat | str:
    if options.to == Target.DENSE:
        return dense_dtype(artifact, base, options.dtype)
    if isinstance(base, StoredTensor):
        if adapted is None:
            return base.format
        if adapted.block_size is not None:
            return replace(base.format, tau_dtype=options.tau.value)
        assert again is not None
        return replace(base.format, scale_dtype="uint8", tau_dtype=again.tau_dtype)
    return base.dtype


def noted_means(artifact: Artifact, options: MergeOptions) -> dict[str, Any]:
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
    uniform = get_codebook(base.format.codebook).kind == "int"
    own = {} if uniform else {"zero_point": "float"}
    return QuantSpec(base.format.codebook, base.format.block_size, **{**means, **own})


def _config(base: QuantizationConfig, jobs: list[Job]) -> QuantizationConfig:
    """The configuration that is true of the result: a common tau dtype becomes the default's."""
    formats = {
        module_name(job.name): job.target for job in jobs if isinstance(job.target, ModuleFormat)
    }
    taus = {fmt.tau_dtype for fmt in formats.values()}
    default = replace(base.default, tau_dtype=taus.pop()) if len(taus) == 1 else base.default
    overrides = {name: fmt for name, fmt in formats.items() if fmt != default}
    meta = {**base.meta, "producer": f"irq-convert {__version__}"}
    return QuantizationConfig(default, base.modules_to_not_convert, overrides, meta)
