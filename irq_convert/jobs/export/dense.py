"""`--to dense`: a normal checkpoint in 16 or 32 bits."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from irq_convert.artifact.contents import Artifact
from irq_convert.checkpoint.float_dtypes import WORDS
from irq_convert.jobs.export.folder import plan_export_folder, write_export_folder
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.target import ExportPlan, PlannedTensor, Target, TargetResult
from irq_convert.jobs.export.tiles import DenseEncoder
from irq_convert.progress import Progress


class DenseTarget(Target):
    """Every weight as the artifact decodes it, rounded once to the dtype."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "a Hugging Face checkpoint in 16 or 32 bits"
    takes: ClassVar[frozenset[str]] = frozenset({"dtype", "max_shard_bytes"})

    def plan(self, artifact: Artifact, options: ExportOptions, progress: Progress) -> ExportPlan:
        folder = plan_export_folder(artifact, options, DenseEncoder, lambda config: config)
        return ExportPlan(
            artifact,
            options,
            folder.files,
            tuple(
                PlannedTensor(item.name, WORDS[item.dtype], exact=True)
                for item in folder.tensors
                if item.encoder is not None
            ),
            detail=folder,
        )

    def write(self, plan: ExportPlan, folder: Path, progress: Progress) -> TargetResult:
        return TargetResult(write_export_folder(plan.detail, folder, plan.options, progress))


TARGET = DenseTarget()
