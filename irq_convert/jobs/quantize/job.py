"""A conversion as a job of shards: what tells it from others, and what is noted of each shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irq_convert.artifact.config import FORMAT_VERSION
from irq_convert.artifact.manifest import describe_source
from irq_convert.checkpoint.fetcher import ReadOrder, require_room
from irq_convert.core.tensor_stats import encode_stats
from irq_convert.jobs.common.identity import Identity, fingerprint_files, plan_digest
from irq_convert.jobs.common.shard_job import OutputShard, ShardJob, ShardMaker
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.pipeline import quantize_shard
from irq_convert.jobs.quantize.plan import QuantizePlan
from irq_convert.progress import Progress


def quantize_identity(plan: QuantizePlan, model: str, options: QuantizeOptions) -> Identity:
    """What has to be the same for a conversion of `model` to be continued.

    `IrqError` when a local source cannot be read.
    """
    checkpoint = plan.checkpoint
    pinned = checkpoint.revision is not None
    headers = ((shard.name, shard.header) for shard in plan.folder.shards)
    return Identity(
        job=f"quantize to format irq {FORMAT_VERSION}",
        source=describe_source(checkpoint, model),
        options=options.to_dict(),
        plan=plan_digest(headers),
        files={} if pinned else fingerprint_files(checkpoint.folder, checkpoint.shards),
    )


def output_shards(plan: QuantizePlan) -> tuple[OutputShard, ...]:
    """The output files of `plan`; the progress counts bytes of the source."""
    return tuple(
        OutputShard(s.name, s.nbytes, sum(t.info.nbytes for t in s.tensors), len(s.tensors))
        for s in plan.folder.shards
    )


def quantize_job(plan: QuantizePlan, model: str, out: Path, options: QuantizeOptions) -> ShardJob:
    """The job of writing the shards of `plan`."""

    def read_order(numbers: Sequence[int]) -> ReadOrder:
        tensors = (tensor for number in numbers for tensor in plan.folder.shards[number].tensors)
        return plan.checkpoint.read_order(tensor.info for tensor in tensors)

    def require(there: int, shares: Sequence[Sequence[int]]) -> None:
        require_room(out, plan.bytes_needed - there, [read_order(share) for share in shares])

    def maker(mine: Sequence[int]) -> ShardMaker:
        own = read_order(mine)

        def make(number: int, folder: Path, progress: Progress) -> Mapping[str, Any]:
            stats = quantize_shard(plan.folder.shards[number], folder, options, progress, own)
            return {name: encode_stats(found) for name, found in stats.items()}

        return make

    return ShardJob(
        out=out,
        source=plan.checkpoint.folder,
        overwrite=options.overwrite,
        resume=options.resume,
        identity=quantize_identity(plan, model, options),
        shards=output_shards(plan),
        require=require,
        phase="quantizing",
        maker=maker,
    )
