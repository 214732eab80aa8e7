"""Progress over several processes: the first one shows what all have done."""

from __future__ import annotations

from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.progress import Progress


class SharedProgress(Progress):
    """A process's own progress: added to the others', and stopped when one of them fails."""

    def __init__(self, inner: Progress, processes: RunProcesses) -> None:
        self._inner, self._processes = inner, processes
        self._shown = (0, 0)

    def stage(self, text: str) -> None:
        self._inner.stage(text)

    def note(self, text: str) -> None:
        self._inner.note(text)

    def advance(self, nbytes: int, finished: int) -> None:
        self._inner.advance(nbytes, finished)
        self._processes.count(nbytes, finished)
        self.look()

    def look(self) -> bool:
        """Show what the others have done since; never true."""
        if not self._processes.ranks.alone:
            self._processes.watch()
            nbytes, tensors = self._processes.others()
            if (nbytes, tensors) != self._shown and self._processes.ranks.first:
                self._inner.advance(nbytes - self._shown[0], tensors - self._shown[1])
                self._shown = (nbytes, tensors)
        return False
