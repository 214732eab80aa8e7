"""`verify`: is an artifact whole, legal and true to its source."""

from __future__ import annotations

from pathlib import Path

from irq_convert.artifact.verify import VerifyReport, verify_artifact
from irq_convert.checkpoint.locate import open_source
from irq_convert.errors import UsageError
from irq_convert.progress import Progress


def verify(
    folder: str | Path,
    against: str | Path | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check the artifact in `folder`, and `against` its source, a folder or a Hub id, where given.

    What is wrong is in the report's `failures`, a line each. Raises `UsageError` when `folder` is
    no artifact or `revision` (of the source on the Hub) stands alone, `IrqError` when the source
    cannot be read.
    """
    if revision is not None and against is None:
        raise UsageError("--revision is that of the source: give the source with --against")
    source = None if against is None else open_source(str(against), revision)
    return verify_artifact(Path(folder), against=source, progress=progress)
