"""A conversion as a job of shards: what tells it from others, and what is noted of each shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from irq_convert.artifact.config import FORMAT_VERSION
from irq_convert.artifact.manifest import describe_source
from irq_convert.checkpoint.supply import Feed, require_room
from irq_convert.checkpoint.writer import build_header
from irq_convert.convert.options import ConvertOptions
from irq_convert.convert.pipeline import convert_shard
from irq_convert.convert.plan import ConversionPlan
from irq_convert.core.blocks import BlockShape
from irq_convert.core.stats import TensorStats
from irq_convert.jobs.identity import Identity, fingerprint_files, plan_digest
from irq_convert.jobs.progress import Progress
from irq_convert.jobs.run import Job, Maker, Part


def conversion_identity(plan: ConversionPlan, model: str, options: ConvertOptions) -> Identity:
    """What has to be the same for a conversion of `model` to be continued.

    `IrqError` when a local source cannot be read.
    """
    checkpoint = plan.checkpoint
    pinned = checkpoint.revision is not None
    headers = ((s.name, build_header(s.outputs, {"format": "pt"})) for s in plan.shards)
    return Identity(
        job=f"quantize to format irq {FORMAT_VERSION}",
        source=describe_source(checkpoint, model),
        options=options.to_dict(),
        plan=plan_digest(headers),
        files={} if pinned else fingerprint_files(checkpoint.folder, checkpoint.shards),
    )


def conversion_parts(plan: ConversionPlan) -> tuple[Part, ...]:
    """The output files of `plan`; the progress counts bytes of the source."""
    return tuple(
        Part(s.name, s.nbytes, sum(t.info.nbytes for t in s.tensors), len(s.tensors))
        for s in plan.shards
    )


def conversion_job(plan: ConversionPlan, model: str, out: Path, options: ConvertOptions) -> Job:
    """The job of writing the shards of `plan`."""

    def feed(numbers: Sequence[int]) -> Feed:
        tensors = (tensor for number in numbers for tensor in plan.shards[number].tensors)
        return plan.checkpoint.feed(tensor.info for tensor in tensors)

    def require(there: int, shares: Sequence[Sequence[int]]) -> None:
        require_room(out, plan.bytes_needed - there, [feed(share) for share in shares])

    def maker(mine: Sequence[int]) -> Maker:
        own = feed(mine)

        def make(number: int, folder: Path, progress: Progress) -> Mapping[str, Any]:
            stats = convert_shard(plan.shards[number], folder, options, progress, own)
            return {name: encode_stats(found) for name, found in stats.items()}

        return make

    return Job(
        out=out,
        source=plan.checkpoint.folder,
        overwrite=options.overwrite,
        resume=options.resume,
        identity=conversion_identity(plan, model, options),
        parts=conversion_parts(plan),
        require=require,
        phase="quantizing",
        maker=maker,
    )


def encode_stats(stats: TensorStats) -> dict[str, Any]:
    """`stats` as JSON, its energies summed up: all that is ever read of them."""
    shape = stats.shape
    return {
        "shape": [shape.rows, shape.cols, shape.block_size, shape.bits],
        "plain": int(stats.plain),
        "stored": int(stats.stored),
        "energies": [stats.energy, stats.squared_error],
    }


def decode_stats(found: Mapping[str, Any]) -> TensorStats:
    """The statistics that `encode_stats` was given: the same in every figure, to the last bit."""
    energies = np.array([found["energies"]], dtype=np.float64)
    return TensorStats(BlockShape(*found["shape"]), found["plain"], found["stored"], energies)
