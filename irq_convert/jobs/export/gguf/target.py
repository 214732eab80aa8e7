"""The target `gguf` as the frame of `export` sees it.

The package `gguf` is only imported when work begins, so that its absence can be told in one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from irq_convert.artifact.contents import Artifact
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.target import ExportPlan, Target, TargetResult
from irq_convert.progress import Progress


class GgufTarget(Target):
    """One .gguf file with weights, metadata and tokenizer; for Llama, Mistral, Qwen2 and Qwen3.

    Integer codebooks become Q4_1 (codes kept, one float16 rounding of d and m); --fallback is for
    what Q4_1 cannot hold, --dtype for embeddings and other tensors that were never quantized.
    """

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "one file for llama.cpp: int codebooks as Q4_1, others dense or Q8_0"
    takes: ClassVar[frozenset[str]] = frozenset({"dtype", "fallback"})
    dtypes: ClassVar[tuple[str, ...]] = ("auto", "bfloat16", "float16", "float32", "q8_0")
    fallbacks: ClassVar[tuple[str, ...]] = ("auto", "f16", "bf16", "f32", "q8_0")
    packages: ClassVar[tuple[str, ...]] = ("gguf",)

    def plan(self, artifact: Artifact, options: ExportOptions, progress: Progress) -> ExportPlan:
        """Decide names, types and places of all tensors, and build the header with the tokenizer.

        Raises `UsageError` for a model that llama.cpp would not compute alike (another family, an
        unknown tensor, a kind of rope, experts, no tokenizer or one it cannot follow) and
        `IrqError` for files that cannot be read.
        """
        from irq_convert.jobs.export.gguf.plan import plan_gguf

        return plan_gguf(artifact, options, progress)

    def write(self, plan: ExportPlan, folder: Path, progress: Progress) -> TargetResult:
        """Write the file tile by tile; it has its name only when every byte is on the disk."""
        from irq_convert.jobs.export.gguf.write import write_file

        return write_file(plan, folder, progress)
