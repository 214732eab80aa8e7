"""The whole job: from the names of an artifact and a data file to an adapter folder.

Everything that can be refused is looked at before Trainer is imported, which takes seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.contents import find_manifest
from irq_convert.artifact.identity import artifact_identity
from irq_convert.artifact.results import describe_base
from irq_convert.checkpoint.locate import locate
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.options import as_choice, chosen
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.finetune.folder import RUN, RunFolder, check_folder, run_folder
from irq_convert.jobs.finetune.options import FinetuneOptions
from irq_convert.jobs.finetune.prepare import Preparation, prepare
from irq_convert.jobs.finetune.processes import Processes
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.recipe import recipe_differences
from irq_convert.jobs.finetune.report import FinetuneReport
from irq_convert.jobs.finetune.teacher_logits import teacher_logits
from irq_convert.remote_code import remote_code


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    options: FinetuneOptions | None = None,
    *,
    eval_data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    resume: Resume | str = Resume.AUTO,
    overwrite: bool = False,
    progress: TrainingProgress | None = None,
    **settings: Any,
) -> FinetuneReport:
    """Train an adapter for the artifact `model` on `data` and write it to the folder `out`.

    `options`, or single `settings` of `FinetuneOptions` (`lora="block", steps=500`).

    SIGINT, SIGTERM and SIGHUP end the run after the step at hand; adapter and state are kept, the
    report says `interrupted`, and the same call continues, as `resume` says. Works in each process
    of torchrun; the first one writes.

    Raises `UsageError` where the request cannot be served; `IrqError` where something cannot be
    read or written, memory is short, the loss became NaN or infinite (then `out` holds the last
    good adapter), or KL to a teacher is not lower than before (then it holds none).
    """
    begun = time.perf_counter()
    resume = as_choice(Resume, resume, "resume")
    options, out = chosen(FinetuneOptions, options, settings), Path(out)
    with remote_code(options.trust_remote_code):
        return _finetune(
            model,
            data,
            out,
            options,
            {"eval_data": eval_data, "tokenizer": tokenizer},
            resume=resume,
            overwrite=overwrite,
            progress=progress or TrainingProgress(),
            begun=begun,
        )


def _finetune(
    model: str | Path,
    data: str | Path,
    out: Path,
    options: FinetuneOptions,
    beside: Mapping[str, Any],
    *,
    resume: Resume,
    overwrite: bool,
    progress: TrainingProgress,
    begun: float,
) -> FinetuneReport:
    processes = Processes.from_environment()
    if processes.first:
        check_folder(
            out, locate(str(model), headers_only=True).folder, resume=resume, overwrite=overwrite
        )
    plan = prepare(model, data, options, **beside, progress=progress)
    base = _base(plan)
    try:
        if not processes.first:
            return _run(plan, base, out, progress, begun, None)
        with run_folder(out, plan.folder, resume=resume, overwrite=overwrite) as folder:
            _open(folder, plan, base, out, progress)
            return _run(plan, base, out, progress, begun, folder)
    except torch.OutOfMemoryError as error:
        raise IrqError(
            f"out of memory on {plan.recipe.device}: lower --micro-batch or --sequence-length, or "
            "use --gradient-checkpointing"
        ) from error


def _base(plan: Preparation) -> dict[str, Any]:
    """Which artifact the adapter belongs to, by its Hub id or its name without a path."""
    path = Path(plan.model)
    name = path.resolve().name if path.exists() else plan.model
    return describe_base(name, artifact_identity(plan.folder), find_manifest(plan.folder))


def _run(
    plan: Preparation,
    base: dict[str, Any],
    out: Path,
    progress: TrainingProgress,
    begun: float,
    folder: RunFolder | None,
) -> FinetuneReport:
    """What is left to do: a teacher's logits, where there is one, and the training."""
    progress.called(plan.recipe.measure, plan.recipe.trained_on)
    with teacher_logits(plan, folder, out, progress) as logits:
        from irq_convert.jobs.finetune.training_run import Run

        return Run(plan, base, out, progress, begun, logits).work(folder)


def _open(
    folder: RunFolder,
    plan: Preparation,
    base: dict[str, Any],
    out: Path,
    progress: TrainingProgress,
) -> None:
    """Record which run this is, or check that it is the one to be continued."""
    settings = {
        "base": base["sha256"],
        "data": plan.data.file.sha256,
        "eval_data": plan.data.eval_file and plan.data.eval_file.sha256,
        "tokens": plan.data.tokens_sha256,
        "recipe": plan.recipe.to_dict(),
    }
    old = folder.read(RUN) if folder.resuming else None
    if old is None:
        folder.write(RUN, settings)
        return
    what = {"base": "the base model", "data": "the data file", "eval_data": "the held-out file"}
    changed = [f"{what[key]} is another one" for key in what if old.get(key) != settings[key]]
    changed += recipe_differences(old.get("recipe") or {}, settings["recipe"])
    if not changed and old.get("tokens", settings["tokens"]) != settings["tokens"]:
        changed = ["the tokenizer makes other tokens of the data"]
    if changed:
        raise UsageError(
            f"{out}: holds an unfinished run of another kind: {'; '.join(changed)}; ask for the "
            "same again, or start anew with --resume never"
        )
    progress.note(f"continuing the run in {out}")
