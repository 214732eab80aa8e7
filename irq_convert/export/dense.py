"""`--to dense`: a normal checkpoint in 16 or 32 bits, by the writer that merges use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from irq_convert.artifact.contents import Artifact, read_quantized
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.columns import row_tiles
from irq_convert.checkpoint.header import TensorInfo, read_header
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.export.options import ExportOptions
from irq_convert.export.shards import dense_plan, document_sizes, write_documents
from irq_convert.export.target import Difference, ExportPlan, PlannedTensor, Target, Written
from irq_convert.export.tiles import WORDS, difference
from irq_convert.jobs.progress import Progress
from irq_convert.merge.pipeline import Means, merge_shard
from irq_convert.merge.plan import MergePlan


class DenseTarget(Target):
    """Every weight as the artifact decodes it, rounded once to the dtype."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "a Hugging Face checkpoint in 16 or 32 bits"
    takes: ClassVar[frozenset[str]] = frozenset({"dtype", "max_shard_bytes"})

    def plan(self, artifact: Artifact, options: ExportOptions, progress: Progress) -> ExportPlan:
        merged = dense_plan(artifact, options)
        files = {shard.name: shard.nbytes for shard in merged.shards}
        return ExportPlan(
            artifact,
            options,
            files | document_sizes(artifact, merged.carried_files, merged.documents),
            tuple(
                PlannedTensor(job.name, WORDS[str(job.target)], exact=True)
                for job in merged.jobs
                if isinstance(job.base, StoredTensor)
            ),
            detail=merged,
        )

    def write(self, plan: ExportPlan, folder: Path, progress: Progress) -> Written:
        merged: MergePlan = plan.detail
        progress.phase("exporting", len(merged.jobs), merged.nbytes)
        means = Means(None, merged.options)
        for shard in merged.shards:
            merge_shard(shard, folder, means, progress)
        write_documents(plan.artifact, folder, merged.carried_files, merged.documents)
        return Written(list(_differences(plan, merged, folder, progress)))


def _differences(
    plan: ExportPlan, merged: MergePlan, folder: Path, progress: Progress
) -> Iterator[Difference]:
    """What lies on the disk against the artifact."""
    quantized = {tensor.name: tensor for tensor in plan.artifact.quantized}
    progress.phase("comparing", len(quantized), sum(t.nbytes for t in quantized.values()))
    with TileReader() as reader:
        for shard in merged.shards:
            for name, info in read_header(folder / shard.name).tensors.items():
                if name in quantized:
                    yield _compare(reader, quantized[name], info, plan.options.tile_weights)
                    progress.advance(quantized[name].nbytes, finished=True)


def _compare(
    reader: TileReader, tensor: StoredTensor, written: TensorInfo, tile_weights: int
) -> Difference:
    total = Difference(tensor.name, 0, 0.0, 0.0, 0.0, 0.0)
    step = tensor.shape.tile_rows(tile_weights)
    for start, rows in row_tiles(reader, written, step, tensor.format.transposed):
        dense = dequantize_tensor(read_quantized(reader, tensor, start, start + rows.shape[0]))
        total += difference(tensor.name, dense, rows.double())
    return total


TARGET = DenseTarget()
