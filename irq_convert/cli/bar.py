"""The progress bar of a conversion or a merge: tensors, speed, memory and the time left."""

from __future__ import annotations

import resource
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from irq_convert.jobs.progress import Progress as Listener


def peak_memory() -> int:
    """The most bytes of memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ConversionBar(Listener):
    """Draws on stderr, and only on a terminal; notes are printed in any case.

    It appears with the first `stage`: before, a download may be drawing bars of its own. One line
    of at most 80 columns, whatever the counts.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[tensors]}"),
            TransferSpeedColumn(),
            TextColumn("{task.fields[memory]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, tensors="", memory="")
        self._tensors = self._done = 0

    def __enter__(self) -> ConversionBar:
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

    def phase(self, text: str, tensors: int, nbytes: int) -> None:
        self._tensors, self._done = tensors, 0
        self._bar.reset(self._task, description=text, total=nbytes)
        self._bar.start()

    def resumed(self, tensors: int, nbytes: int) -> None:
        self._done += tensors
        self._bar.reset(self._task, completed=nbytes)  # so that it does not count for the speed
        self._bar.update(self._task, tensors=self._count())

    def note(self, text: str) -> None:
        line = f"irq-convert: {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def kept(self, text: str) -> None:
        self.note(f"stopped; {text}")

    def advance(self, nbytes: int, finished: int) -> None:
        self._done += finished
        self._bar.update(
            self._task,
            advance=nbytes,
            tensors=self._count(),
            memory=f"{peak_memory() / 1e9:.2f} GB",
        )

    def _count(self) -> str:
        return f"{self._done}/{self._tensors} tensors"
