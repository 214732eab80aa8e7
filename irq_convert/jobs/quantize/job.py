"""A conversion as a job of shards: what tells it from others, and what is noted of each shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from irq_convert.artifact.config import FORMAT_VERSION
from irq_convert.artifact.manifest import describe_source
from irq_convert.checkpoint.disk import Staging, partial_folder
from irq_convert.checkpoint.fetcher import ReadOrder, require_room
from irq_convert.core.tensor_stats import encode_stats
from irq_convert.jobs.calibration.loop import Calibrated
from irq_convert.jobs.calibration.workspace import calibration_folders
from irq_convert.jobs.common.identity import Identity, fingerprint_files, plan_digest
from irq_convert.jobs.common.records import list_shard_records
from irq_convert.jobs.common.resume import Resume, nothing_to_resume, refuse_another_run
from irq_convert.jobs.common.shard_job import OutputShard, ShardJob, ShardMaker
from irq_convert.jobs.quantize.importance import Weighing
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.pipeline import quantize_shard
from irq_convert.jobs.quantize.plan import QuantizePlan, TensorPlan
from irq_convert.progress import Progress


def quantize_identity(
    plan: QuantizePlan, model: str, options: QuantizeOptions, of_data: Mapping[str, Any]
) -> Identity:
    """What has to be the same for a conversion of `model` to be continued.

    `of_data` tells the text or the importance that the weights are fitted to.

    `IrqError` when a local source cannot be read.
    """
    checkpoint = plan.checkpoint
    pinned = checkpoint.revision is not None
    headers = ((shard.name, shard.header) for shard in plan.folder.shards)
    return Identity(
        job=f"quantize to format irq {FORMAT_VERSION}",
        source=describe_source(checkpoint, model),
        options={**options.to_dict(), **of_data, **_formats(plan, options)},
        plan=plan_digest(headers),
        files={} if pinned else fingerprint_files(checkpoint.folder, checkpoint.shards),
    )


def refuse_early(
    plan: QuantizePlan,
    model: str,
    out: Path,
    options: QuantizeOptions,
    weighing: Weighing | None,
) -> None:
    """Raise at once what `find_finished` would raise after hours of calibrating or measuring.

    `UsageError` where shards are finished of a run that this one cannot be, or where one is
    required and neither a shard nor a layer is finished.
    """
    staging = Staging(partial_folder(out), keep=True)
    finished = staging.records.is_dir() and list_shard_records(staging.records)
    if options.resume == Resume.REQUIRED and not finished:
        layers = (Staging(root, keep=True).records for root in calibration_folders(out))
        if not any(map(list_shard_records, filter(Path.is_dir, layers))):
            raise nothing_to_resume(staging)
    if options.resume != Resume.NEVER and finished:  # else nothing needs a look at the source
        of_data = {} if weighing is None else weighing.of_data
        known = quantize_identity(plan, model, options, of_data)
        told = {key: value for key, value in known.options.items() if key != "formats"}
        refuse_another_run(staging, replace(known, options=told))


def _formats(plan: QuantizePlan, options: QuantizeOptions) -> dict[str, Any]:
    """What a target has chosen, which the options do not tell."""
    return {} if options.target is None else {"formats": plan.config.to_dict()}


def output_shards(
    plan: QuantizePlan, calibrated: Calibrated | None = None
) -> tuple[OutputShard, ...]:
    """The output files of `plan`; the progress counts bytes of what is read."""
    made = {} if calibrated is None else calibrated.infos

    def size(tensor: TensorPlan) -> int:
        parts = made.get(tensor.name)
        return tensor.info.nbytes if parts is None else sum(part.nbytes for part in parts)

    return tuple(
        OutputShard(s.name, s.nbytes, sum(map(size, s.tensors)), len(s.tensors))
        for s in plan.folder.shards
    )


def quantize_job(
    plan: QuantizePlan,
    model: str,
    out: Path,
    options: QuantizeOptions,
    *,
    of_data: Mapping[str, Any] | None = None,
    calibrated: Calibrated | None = None,
    weighing: Weighing | None = None,
) -> ShardJob:
    """The job of writing the shards of `plan`, with what is `calibrated` already.

    `weighing` says how much the columns count.
    """
    made = {} if calibrated is None else calibrated.infos

    def read_order(numbers: Sequence[int]) -> ReadOrder:
        tensors = (tensor for number in numbers for tensor in plan.folder.shards[number].tensors)
        return plan.checkpoint.read_order(t.info for t in tensors if t.name not in made)

    def require(there: int, shares: Sequence[Sequence[int]]) -> None:
        require_room(out, plan.bytes_needed - there, [read_order(share) for share in shares])

    def maker(mine: Sequence[int]) -> ShardMaker:
        own = read_order(mine)

        def make(number: int, folder: Path, progress: Progress) -> Mapping[str, Any]:
            shard = plan.folder.shards[number]
            stats = quantize_shard(shard, folder, options, progress, own, calibrated, weighing)
            return {name: encode_stats(found) for name, found in stats.items()}

        return make

    return ShardJob(
        out=out,
        source=plan.checkpoint.folder,
        overwrite=options.overwrite,
        resume=options.resume,
        identity=quantize_identity(
            plan, model, options, {**(of_data or {}), **(weighing.of_data if weighing else {})}
        ),
        shards=output_shards(plan, calibrated),
        require=require,
        phase="quantizing",
        maker=maker,
    )
