"""What an evaluation on tasks is asked to do: examples, documents, where tasks are found.

Nothing heavy is imported here, so that the command line can name the choices without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from irq_convert.errors import UsageError
from irq_convert.jobs.common.options import fix_choices
from irq_convert.jobs.evaluate.options import EvalDtype


@dataclass(frozen=True)
class TaskOptions:
    """Options of an evaluation on tasks of lm-evaluation-harness.

    Attributes:
        fewshot: solved examples before each question; None is what each task says itself. Tasks
            that fix it at 0 keep that.
        limit: only the first documents of each task, so many; None is all.
        task_paths: folders with task files of one's own (YAML), before those of lm-eval.
        chat: put questions to the model in its chat template.
        context: the longest request in tokens; None is what the model can take.
        batch_size: requests in one forward pass.
        keep: write the scores beside the artifact or the adapter, for its card.
        dtype, device, trust_remote_code: as in `EvalOptions`.

    Raises `UsageError` where a value is out of its range, or a folder of tasks is none.
    """

    fewshot: int | None = None
    limit: int | None = None
    task_paths: tuple[Path, ...] = ()
    chat: bool = False
    context: int | None = None
    batch_size: int = 1
    keep: bool = True
    dtype: EvalDtype = EvalDtype.FLOAT32
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        fix_choices(self, dtype=EvalDtype)
        object.__setattr__(self, "task_paths", tuple(map(Path, self.task_paths)))
        if self.fewshot is not None and self.fewshot < 0:
            raise UsageError(f"--fewshot {self.fewshot}: 0 or more")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1")
        if self.context is not None and self.context < 2:
            raise UsageError(f"--context {self.context}: at least 2 tokens")
        for path in self.task_paths:
            if not path.is_dir():
                raise UsageError(f"--task-path {path}: no such folder; give one with task files")
