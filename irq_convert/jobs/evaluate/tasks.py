"""The whole job on tasks: from names of models and tasks to scores, through lm-eval."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irq_convert.adapters.put_on import CheckedAdapter
from irq_convert.adapters.runnable import Runnable, check_runnable
from irq_convert.artifact.scores import keep_scores, keeps_scores
from irq_convert.errors import IrqError, UsageError, one_line
from irq_convert.hf.limits import check_context
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.evaluate.harness import Tasks, answer, harness_version, no_bars
from irq_convert.jobs.evaluate.task_options import TaskOptions
from irq_convert.jobs.evaluate.task_report import Found, TaskReport, compare, shown_scores
from irq_convert.progress import Progress
from irq_convert.remote_code import remote_code


def evaluate_tasks(
    model: str | Path,
    tasks: str | Sequence[str],
    *,
    adapter: str | Path | CheckedAdapter | None = None,
    against: str | Path | None = None,
    tokenizer: str | Path | None = None,
    any_base: bool = False,
    options: TaskOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> TaskReport:
    """Evaluate a model (folder or Hub id) on tasks of lm-evaluation-harness, by name.

    `options`, or single `settings` of `TaskOptions` (`fewshot=5`). With `adapter` it is put on the
    model first, and must have been trained on it unless `any_base`; with `against` the same
    questions are put to another model, without the adapter, one model in memory at a time. Scores
    are kept beside the artifact or adapter unless `keep=False`.

    Raises `UsageError` where lm-eval is not installed, a task is unknown (naming those spelt
    alike), or options and models do not fit together; `IrqError` where data of a task or a model
    cannot be read, and where the device is out of memory.
    """
    options, progress = chosen(TaskOptions, options, settings), progress or Progress()
    harness = harness_version()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    with remote_code(options.trust_remote_code), no_bars():
        models = check_runnable(
            model,
            adapter=adapter,
            against=against,
            tokenizer=tokenizer,
            any_base=any_base,
            device=options.device,
        )
        for each in models:
            _check_chat(each, options)
            if options.context is not None:
                check_context(each.config, options.context, "--context")
        progress.stage("reading tasks")
        known = Tasks(names, options)
        first = known.load()
        found = []
        for number, each in enumerate(models):
            built = first if number == 0 else known.load()
            found.append(_run(each, built, known, options, progress))
    rows = found[0].scores() if against is None else compare(found[0], found[1])
    report = TaskReport(tuple(rows), shown_scores(found[0], rows), harness)
    if not options.keep:
        return report
    return _kept(report, models[0], against, options, progress)


def _check_chat(model: Runnable, options: TaskOptions) -> None:
    if options.chat and not getattr(model.tokenizer, "chat_template", None):
        raise UsageError(
            f"{model.source}: its tokenizer has no chat template: leave --chat out, or name a "
            "tokenizer that has one by --tokenizer"
        )


def _run(
    model: Runnable,
    built: list[Any],
    known: Tasks,
    options: TaskOptions,
    progress: Progress,
) -> Found:
    """One model on all tasks; it leaves memory with this call."""
    from irq_convert.jobs.evaluate.harness_model import HarnessModel

    progress.stage("loading")
    loaded, source = model.load(getattr(torch, options.dtype), options.device), model.source
    try:
        lm = HarnessModel(loaded, model.tokenizer, options, progress)
        return Found(answer(lm, built, known.manager, options))
    except IrqError:
        raise
    except torch.OutOfMemoryError as error:
        raise IrqError(f"{source}: out of memory: lower --batch-size or --fewshot") from error
    except Exception as error:  # a task's own code may raise anything
        kind = type(error).__name__
        raise IrqError(f"{source}: the tasks cannot be run: {kind}: {one_line(error)}") from error
    finally:
        del loaded
        gc.collect()


def _kept(
    report: TaskReport,
    model: Runnable,
    against: str | Path | None,
    options: TaskOptions,
    progress: Progress,
) -> TaskReport:
    """Write the scores beside what they are of; a disk that refuses costs the file, not the run."""
    folder = Path(model.source if model.adapter is None else model.adapter.folder)
    if not folder.is_dir() or not keeps_scores(folder):
        return report
    said = {
        "limit": options.limit,
        "chat": options.chat,
        "dtype": str(options.dtype),
        "against": None if against is None else _called(against),
        "lm_eval": report.lm_eval,
    }
    whole = [score for score in report.scores if math.isfinite(score.value)]
    if len(whole) < len(report.scores):
        count = len(report.scores) - len(whole)
        progress.note(f"{count} of {len(report.scores)} scores are no finite numbers: not kept")
    try:
        rows = [score.to_dict() | {"in_group": score not in report.shown} | said for score in whole]
        path = keep_scores(folder, rows)
    except IrqError as error:
        progress.note(f"the scores are not kept: {error}")
        return report
    return replace(report, kept=str(path))


def _called(source: str | Path) -> str:
    """A Hub id, or the name of a folder without its path."""
    return Path(source).resolve().name if Path(source).exists() else str(source)
