"""Whether an adapter that was trained towards a teacher is kept: when it is nearer to it."""

from __future__ import annotations

from irq_convert.errors import IrqError
from irq_convert.jobs.common.torchrun import FailedElsewhere
from irq_convert.jobs.finetune.folder import LOGITS, RunFolder
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.report import FINISHED, FinetuneReport

_NOTHING = 1e-4
"""What is no change, as part of a figure."""


def withdraw_unless_lower(
    report: FinetuneReport, folder: RunFolder | None, progress: TrainingProgress
) -> None:
    """Raise `IrqError`, and give the run up, where KL to the teacher is not lower than before, or
    training has made the start of an adapter worse.

    Nothing happens to a run without a teacher, or one that has not come to its end. Where nothing
    is held out it is said that nobody knows. `folder` is given in the first process; in the others
    the error is `FailedElsewhere`.
    """
    recipe, before, after = report.recipe, report.before, report.after
    if recipe.teacher is None or report.end != FINISHED:
        return
    if before is None or after is None:
        if folder is not None:
            progress.note(
                f"{recipe.measure} was not measured, as nothing is held out: the adapter is kept, "
                "better or not"
            )
        return
    lower, start = after.mean < before.mean, report.start
    if lower and (start is None or after.mean <= start.mean * (1 + _NOTHING)):
        return
    if folder is None:
        raise FailedElsewhere("the adapter is not kept")
    folder.withdraw()
    was, began = f"{before.mean:.4f}", ""
    if lower and start is not None:
        was, began = f"{start.mean:.4f}", "where it started "
    logits = folder.state / LOGITS
    waiting = (
        f"; the teacher's logits wait in {logits} for the next run" if logits.is_file() else ""
    )
    raise IrqError(
        f"no adapter is kept: {recipe.measure} on held-out data was {was} nats a token "
        f"{began}and is {after.mean:.4f} after training: lower {recipe.rate_in_words()} or --steps "
        f"({recipe.steps:,}), or give more data{waiting}"
    )
