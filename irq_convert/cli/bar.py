"""The progress bar of all jobs but training: things, speed, memory and the time left."""

from __future__ import annotations

import resource
import sys
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console

from irq_convert.progress import Progress


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ProgressBar(Progress):
    """Draws on stderr, and only on a terminal; notes are printed in any case.

    It appears with the first `stage`: before, a download may be drawing bars of its own. One line
    of at most 80 columns, whatever the counts. `unit` is what things are called; where their size
    is not in bytes, `speed` is False.
    """

    def __init__(self, unit: str = "tensors", speed: bool = True) -> None:
        self._unit = unit
        self._console = Console(stderr=True)
        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=16),
            rich_progress.TextColumn("{task.fields[things]}"),
            *([rich_progress.TransferSpeedColumn()] if speed else []),
            rich_progress.TextColumn("{task.fields[memory]}"),
            rich_progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, things="", memory="")
        self._things = self._done = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def stage(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        self._bar.start()

    def phase(self, text: str, things: int, size: int) -> None:
        self._things, self._done = things, 0
        self._bar.reset(self._task, description=text, total=size)
        self._bar.start()

    def resumed(self, things: int, size: int) -> None:
        self._done += things
        self._bar.reset(self._task, completed=size)  # so that it does not count for the speed
        self._bar.update(self._task, things=self._count())

    def note(self, text: str) -> None:
        line = f"irq-convert: {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def kept(self, text: str) -> None:
        self.note(f"stopped; {text}")

    def advance(self, size: int, finished: int) -> None:
        self._done += finished
        self._bar.update(
            self._task,
            advance=size,
            things=self._count(),
            memory=f"{peak_memory() / 1e9:.2f} GB",
        )

    def _count(self) -> str:
        return f"{self._done}/{self._things} {self._unit}"
