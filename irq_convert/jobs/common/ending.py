"""How a run ends that does not come to its end: what is kept, and the line that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from irq_convert.checkpoint.disk import Staging
from irq_convert.checkpoint.lock import await_members
from irq_convert.errors import IrqError
from irq_convert.jobs.common.records import list_shard_records
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.progress import Progress

_OTHERS = 10.0
"""Seconds that the other processes of a run that failed are given to put their work away."""


class Ending:
    """Decides, in the first process, what a failure leaves of a run of `total` shards."""

    def __init__(
        self, resume: Resume, total: int, processes: RunProcesses, progress: Progress
    ) -> None:
        self._resume, self._total = resume, total
        self._processes, self._progress = processes, progress
        self._begun = False
        self.written = False
        """All shards are there: what fails now is the end of the job."""

    def begun(self, staging: Staging) -> None:
        """The folder is this run's now; before, a failure is none of its business."""
        self._begun = True
        # Also for a second signal, which may come before what the first one leaves is settled.
        staging.keep = self._resume != Resume.NEVER

    @contextmanager
    def settles(self, staging: Staging) -> Iterator[None]:
        """Run the block; when it raises, decide, and add to the error what a person should know.

        The decision is left in `staging.keep`.
        """
        try:
            yield
        except BaseException as error:
            if not self._begun:
                raise
            self._processes.fail(error)
            await_members(staging.root, _OTHERS)
            line = self._settle(staging, error)
            if line and isinstance(error, IrqError):
                raise type(error)(f"{error}; {line}") from error
            if line:
                self._progress.kept(line)
            raise
        staging.keep = self._resume != Resume.NEVER

    def _settle(self, staging: Staging, error: BaseException) -> str | None:
        count = len(list_shard_records(staging.records))
        staging.keep = (
            count > 0 and self._resume != Resume.NEVER and not (self.written and _verdict(error))
        )
        if not staging.keep:
            return None
        staging.remove_temporary()
        return (
            f"{count} of {self._total} shards are finished and kept in {staging.root}: the same "
            "command continues there"
        )


def _verdict(error: BaseException) -> bool:
    """Whether the result itself was refused, which it would be again: no disk had a part in it."""
    if not isinstance(error, IrqError):
        return False
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return False
        at = at.__cause__ or at.__context__
    return True
