"""A teacher's logits for a run: found where they are kept, or made before anything is trained.

The first process makes them with all it has and the others wait, so that the teacher is never in
memory beside the student, and read only once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from irq_convert.checkpoint.disk import require_space
from irq_convert.checkpoint.locate import Fetch, open_source
from irq_convert.checkpoint.system import existing_parent, os_errors
from irq_convert.errors import IrqError
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.finetune.folder import LOGITS, STATE, RunFolder
from irq_convert.jobs.finetune.prepare import Preparation
from irq_convert.jobs.finetune.progress import TrainingProgress
from irq_convert.jobs.finetune.teacher_file import (
    LogitsWriter,
    TaughtExample,
    TeacherLogits,
    all_examples,
    open_logits,
)
from irq_convert.jobs.finetune.teacher_pass import TeacherPass, states_bytes
from irq_convert.jobs.finetune.teacher_source import Teacher, not_layered, open_teacher

_MADE = "teacher"


@contextmanager
def teacher_logits(
    plan: Preparation, folder: RunFolder | None, out: Path, progress: TrainingProgress
) -> Iterator[TeacherLogits | None]:
    """Lend the logits that the run of `plan` trains on; None where it has no teacher.

    `folder` is given in the first process. Raises `UsageError` for a teacher that cannot be run
    layer by layer, `IrqError` where disk or memory do not suffice or logits are not finite.
    """
    teacher = plan.teacher
    if teacher is None:
        yield None
        return
    path = teacher.file or out.resolve() / STATE / LOGITS
    with RunProcesses() as processes:
        if folder is not None:
            found = _ready(teacher, path, plan, folder, progress)
            processes.put(_MADE, b"")
        else:
            processes.take(_MADE)
            found = open_logits(path, teacher.contents, checked=False)
    try:
        yield found
    finally:
        found.close()


def _ready(
    teacher: Teacher, path: Path, plan: Preparation, folder: RunFolder, progress: TrainingProgress
) -> TeacherLogits:
    if path.is_file():
        progress.stage("checking the teacher's logits")
        try:
            return open_logits(path, teacher.contents)
        except IrqError:
            if teacher.file is not None:
                raise
            progress.note("the teacher's logits of an earlier run are of no use here: made again")
    examples = all_examples(plan.data)
    _require_room(teacher, examples, path, folder)
    checkpoint = open_source(teacher.model, teacher.revision, Fetch.AS_READ)
    with checkpoint.fetcher:
        checkpoint.fetcher.tell = progress.waiting
        model = open_teacher(teacher.model, checkpoint, plan.recipe.device)
        try:
            with LogitsWriter(path, teacher.contents) as file:
                TeacherPass(model, examples, folder.state, progress).run(file.write)
        except NotLayered as error:
            raise not_layered(teacher.model, checkpoint, error) from error
    return open_logits(path, teacher.contents, checked=False)


def _require_room(
    teacher: Teacher, examples: list[TaughtExample], path: Path, folder: RunFolder
) -> None:
    """Raise `IrqError` unless the disks hold hidden states and logits."""
    what = "keep the teacher's logits"
    states = states_bytes([len(example.ids) for example in examples], teacher.width)
    kept = teacher.contents.nbytes
    with os_errors("ask for its free space", path):
        one, other = (existing_parent(each).stat().st_dev for each in (path, folder.state))
    if one == other:
        require_space(folder.state, states + kept, f"{what} and its hidden states")
        return
    require_space(path.parent, kept, what)
    require_space(folder.state, states, "keep the teacher's hidden states")
