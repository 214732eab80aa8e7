"""Progress over several processes: the first one shows what all have done."""

from __future__ import annotations

from irq_convert.jobs.meeting import Meeting
from irq_convert.jobs.progress import Progress


class Watched(Progress):
    """A process's own progress: added to the others', and stopped when one of them fails."""

    def __init__(self, inner: Progress, meeting: Meeting) -> None:
        self._inner, self._meeting = inner, meeting
        self._shown = (0, 0)

    def stage(self, text: str) -> None:
        self._inner.stage(text)

    def note(self, text: str) -> None:
        self._inner.note(text)

    def advance(self, nbytes: int, finished: int) -> None:
        self._inner.advance(nbytes, finished)
        self._meeting.count(nbytes, finished)
        self.look()

    def look(self) -> bool:
        """Show what the others have done since; never true."""
        if not self._meeting.ranks.alone:
            self._meeting.watch()
            nbytes, tensors = self._meeting.others()
            if (nbytes, tensors) != self._shown and self._meeting.ranks.first:
                self._inner.advance(nbytes - self._shown[0], tensors - self._shown[1])
                self._shown = (nbytes, tensors)
        return False
