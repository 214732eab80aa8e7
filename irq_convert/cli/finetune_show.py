"""What `finetune` shows: the bar while it trains, the table when it has."""

from __future__ import annotations

from math import exp, isfinite
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from irq_convert.jobs.finetune.progress import TrainingProgress

if TYPE_CHECKING:
    from rich.progress import Task

    from irq_convert.jobs.finetune.data import Data
    from irq_convert.jobs.finetune.estimate import FinetuneEstimate
    from irq_convert.jobs.finetune.recipe import Recipe
    from irq_convert.jobs.finetune.report import FinetuneReport

MOST_ROWS = 12


class _Speed(ProgressColumn):
    """Steps a second, or seconds a step where that is less than one."""

    def render(self, task: Task) -> Text:
        speed = task.speed
        if not speed or not task.fields.get("timed"):
            return Text("")
        return Text(f"{speed:.1f} step/s" if speed >= 1 else f"{1 / speed:.1f} s/step")


class TrainingBar(TrainingProgress):
    """Draws on stderr, and only on a terminal; notes are printed in any case."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            _Speed(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, loss="", timed=False)
        self._loss = self._held = ""
        self._names = "loss", "held out"
        self._training, self._phase = False, ""

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def stage(self, text: str) -> None:
        self._training = False
        self._bar.reset(self._task, description=text, total=None, loss="", timed=False)
        self._bar.start()

    def called(self, held: str, trained: str) -> None:
        short = {"loss": "held out"}.get(held, "held-out KL")
        self._names = "KL" if trained.startswith("KL") else "loss", short

    def phase(self, text: str, things: int, size: int) -> None:
        self._training, self._phase = False, text
        self._bar.reset(self._task, description=text, total=size, loss="", timed=False)
        self._bar.start()

    def waiting(self, text: str) -> None:
        self._bar.update(self._task, description=text or self._phase)

    def advance(self, size: int, finished: int) -> None:
        self._bar.update(self._task, advance=size)

    def start(self, done: int, total: int) -> None:
        self._training = True
        self._bar.reset(self._task, description="training", total=total, completed=done, timed=True)

    def step(self, step: int, loss: float) -> None:
        self._loss = f"{self._names[0]} {loss:.3f}"
        self._bar.update(
            self._task, description="training", completed=step, loss=self._loss + self._held
        )

    def measuring(self, done: int, total: int) -> None:
        if self._training:
            self._bar.update(self._task, description="measuring")
        else:
            self._bar.update(self._task, completed=done, total=total)

    def heldout(self, step: int, loss: float) -> None:
        self._held = f", {self._names[1]} {loss:.3f}"

    def note(self, text: str) -> None:
        line = f"irq-convert: {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_estimate(found: FinetuneEstimate) -> None:
    """The dry run."""
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts

    recipe, memory = found.plan.recipe, found.memory
    batch = f"{recipe.batch_size} sequences: {recipe.micro_batch} a pass"
    if recipe.processes > 1:
        batch += f", {recipe.processes} processes"
    facts(
        [
            ("model", found.plan.model),
            *_data_facts(found.plan.data),
            *_teacher_facts(found),
            ("adapter", _adapter(recipe)),
            ("trainable", f"{found.trainable:,} parameters"),
            ("steps", f"{recipe.steps:,}, {found.epochs:.2f} epochs"),
            ("batch", batch),
            ("learning rate", f"{recipe.learning_rate:g}, {recipe.optimizer}, {recipe.dtype}"),
            ("memory", f"about {short_bytes(memory.total)} on {recipe.device}"),
            ("  weights", short_bytes(memory.weights)),
            ("  adapter", f"{short_bytes(memory.adapter)} with gradients and AdamW's state"),
            ("  activations", f"{short_bytes(memory.activations)}, one pass"),
        ]
    )


def print_report(report: FinetuneReport) -> None:
    """Losses along the run, then what came out."""
    from irq_convert.cli.console import facts, seconds

    _print_losses(report)
    rows = [
        ("adapter", report.out),
        ("", _adapter(report.recipe)),
        *_data_facts(report.data),
        ("trained", f"{report.step:,} steps, {report.trainable:,} parameters"),
    ]
    if report.before is not None and report.after is not None:
        losses = report.before, report.start, report.after
        change, se = report.after.change_from(report.before)
        rows += [
            (
                f"held-out {_short(report.recipe)}",
                " -> ".join(f"{each.mean:.4f}" for each in losses if each is not None)
                + (", the second where training began" if report.start is not None else ""),
            ),
            ("  change", f"{change:+.4f}" + ("" if se is None else f" ±{se:.4f}")),
            _in_other_words(report, report.before.mean, report.after.mean),
        ]
    elif report.recipe.teacher is not None:
        rows.append((report.recipe.measure, "not measured, as nothing is held out"))
    facts([*rows, ("time", seconds(report.seconds))])


def _print_losses(report: FinetuneReport) -> None:
    """A row for each held-out loss, at most `MOST_ROWS`, with the mean training loss since."""
    marks = [p for p in report.curve if p.heldout_loss is not None]
    if len(marks) < 2:
        return
    if len(marks) > MOST_ROWS:
        picks = {round(i * (len(marks) - 1) / (MOST_ROWS - 1)) for i in range(MOST_ROWS)}
        marks = [marks[i] for i in sorted(picks)]
    table = Table()
    recipe = report.recipe
    trained = "KL" if recipe.trained_on.startswith("KL") else recipe.trained_on
    for title in ("step", f"training {trained}", f"held-out {recipe.measure}"):
        table.add_column(title, justify="right")
    last = -1
    for mark in marks:
        since = [p.loss for p in report.curve if last < p.step <= mark.step and p.loss is not None]
        mean = f"{sum(since) / len(since):.4f}" if since else ""
        table.add_row(f"{mark.step:,}", mean, f"{mark.heldout_loss:.4f}")
        last = mark.step
    Console().print(table)


def _short(recipe: Recipe) -> str:
    return "loss" if recipe.teacher is None else "KL"


def _in_other_words(report: FinetuneReport, before: float, after: float) -> tuple[str, str]:
    """Of a loss its perplexity, of KL to a teacher how much of it is gone."""
    if report.recipe.teacher is None:
        return "  perplexity", f"{_exp(before)} -> {_exp(after)}"
    return "", f"{1 - after / before:.1%} of the {report.recipe.measure} is gone"


def _teacher_facts(found: FinetuneEstimate) -> list[tuple[str, str]]:
    """What a dry run says of a teacher."""
    from irq_convert.checkpoint.system import short_bytes

    cost, recipe = found.teacher, found.plan.recipe
    if cost is None:
        return []
    size = f"logits of {cost.tokens:,} tokens, {short_bytes(cost.bytes)}"
    how = f"{size}, are there: {found.plan.teacher and found.plan.teacher.file}"
    if not cost.there:
        how = f"will be run layer by layer: {size}, and {short_bytes(cost.states)} on the way"
    return [("teacher", f"{cost.teacher}, weight {recipe.teacher_weight:g}"), ("", how)]


def _adapter(recipe: Recipe) -> str:
    links = f", connection {recipe.connection}" if recipe.connection not in (None, "both") else ""
    if not recipe.rank:
        return f"{recipe.described}, without matrices"
    return f"{recipe.described}{links}, alpha {recipe.alpha:g}"


def _data_facts(data: Data) -> list[tuple[str, str]]:
    rows = []
    for label, part in (("data", data.train), ("held out", data.heldout)):
        if part is None:
            continue
        text = f"{len(part.examples):,} examples, {part.tokens:,} tokens, {part.learned:,} learned"
        rows.append((label, text))
        if part.truncated or part.dropped:
            rows.append(("", f"({part.truncated:,} cut to length, {part.dropped:,} dropped)"))
    return rows


def _exp(value: float) -> str:
    return f"{exp(value):.3f}" if isfinite(value) and value < 700 else "inf"
