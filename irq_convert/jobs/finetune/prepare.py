"""Everything about a run that is known before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from irq_convert.artifact.contents import Artifact, open_artifact
from irq_convert.checkpoint.locate import locate
from irq_convert.errors import UsageError
from irq_convert.hf.causal_lm import load_config, load_tokenizer, require_causal_lm
from irq_convert.hf.limits import longest_context
from irq_convert.jobs.finetune.data import Data, load_data
from irq_convert.jobs.finetune.model import check_targets, modules_on_meta
from irq_convert.jobs.finetune.options import FinetuneOptions
from irq_convert.jobs.finetune.processes import Processes, choose_device, good_at_bfloat16
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.recipe import Base, Recipe, decide, holdout_fraction, sequence_length
from irq_convert.jobs.finetune.start import Start, find_start
from irq_convert.jobs.finetune.teacher_file import number_rows
from irq_convert.jobs.finetune.teacher_source import Teacher, find_teacher


@dataclass(frozen=True)
class Preparation:
    """All that is known before weights are loaded."""

    model: str
    folder: Path
    artifact: Artifact
    config: Any
    tokenizer: Any
    data: Data
    recipe: Recipe
    processes: Processes
    teacher: Teacher | None = None
    start: Start | None = None


def prepare(
    model: str | Path,
    data: str | Path,
    options: FinetuneOptions | None = None,
    *,
    eval_data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: TrainingProgress | None = None,
) -> Preparation:
    """Read everything but the weights, and make every choice.

    Raises `UsageError` where options, data, model and teacher do not fit together; `IrqError` where
    the artifact, its tokenizer, the teacher or the data cannot be read.
    """
    options, progress = options or FinetuneOptions(), progress or TrainingProgress()
    progress.stage("reading data")
    processes = Processes.from_environment()
    device = choose_device(options.device, processes)
    folder = locate(str(model)).folder
    artifact = open_artifact(folder)
    config = load_config(folder)
    require_causal_lm(model, config)
    if options.target_modules is not None:
        check_targets(options.target_modules, modules_on_meta(config))
    _check_rank(options, artifact)
    text = config.get_text_config()
    base = Base(artifact.weights, longest_context(config), _mean_bits(artifact))
    holdout = holdout_fraction(options, eval_data is not None)
    encoder = load_tokenizer(tokenizer or folder)
    found = load_data(
        Path(data),
        None if eval_data is None else Path(eval_data),
        encoder,
        length=sequence_length(options, base.positions),
        holdout=holdout,
        vocabulary=getattr(text, "vocab_size", None),
    )
    if found.unused:
        names = ", ".join(map(repr, found.unused))
        progress.note(f"{data}: nothing reads these fields of its rows: {names}")
    found, teacher = _taught(options, found, encoder, config, progress)
    start = find_start(options, artifact, found.train.examples, Path(data).name, progress)
    recipe = decide(
        options,
        base,
        examples=len(found.train.examples),
        processes=processes.count,
        device=device,
        bfloat16=good_at_bfloat16(device),
        holdout=holdout,
        teacher=None if teacher is None else (teacher.name, teacher.sha256),
        start=None if start is None else start.sha256,
    )
    return Preparation(
        str(model), folder, artifact, config, encoder, found, recipe, processes, teacher, start
    )


def _mean_bits(artifact: Artifact) -> float:
    """Of a code, over all packed weights."""
    counts = [(tensor.format.bits, prod(tensor.source_shape)) for tensor in artifact.quantized]
    return sum(bits * count for bits, count in counts) / sum(count for _, count in counts)


def _check_rank(options: FinetuneOptions, artifact: Artifact) -> None:
    """Raise `UsageError` for a rank beyond the default that no packed weight can use."""
    sides = {tensor.name: tensor.source_shape[-2:] for tensor in artifact.quantized}
    name = max(sides, key=lambda name: min(sides[name]))
    if options.rank > max(FinetuneOptions.rank, min(sides[name])):
        raise UsageError(
            f"--rank {options.rank}: no change of {name} {list(sides[name])}, or of any other "
            f"packed weight, has a rank above {min(sides[name])}"
        )


def _taught(
    options: FinetuneOptions, data: Data, encoder: Any, config: Any, progress: TrainingProgress
) -> tuple[Data, Teacher | None]:
    """The data as a teacher goes through them, and the teacher, where there is one."""
    if options.teacher is None:
        return data, None
    data = number_rows(data)
    facts = {"data": data, "tokenizer": encoder, "config": config, "progress": progress}
    return data, find_teacher(options.teacher, options.teacher_logits, **facts)
