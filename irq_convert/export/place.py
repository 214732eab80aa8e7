"""Where an export may write: a new folder, or one that this program made."""

from __future__ import annotations

from pathlib import Path

from irq_convert.checkpoint.disk import check_output
from irq_convert.checkpoint.system import existing_parent, os_errors
from irq_convert.errors import UsageError
from irq_convert.merge.target import MARKS

EXPORT_NAME = "irq_export.json"
"""The note that every exported folder holds."""


def check_place(artifact: Path, out: Path, overwrite: bool) -> None:
    """Refuse an `out` that cannot be written before anything is read.

    Raises `UsageError` as `check_output` does, for a path that leads through a file, and for a
    folder that holds something else than such a result: --overwrite deletes it.
    """
    real = check_output(out, artifact, overwrite)
    with os_errors("look at it", out):
        parent = existing_parent(real)
        if not parent.is_dir():
            raise UsageError(f"{out}: {parent} is a file, not a folder; choose another output")
        full = real.is_dir() and any(real.iterdir())
        if full and not any((real / mark).is_file() for mark in (EXPORT_NAME, *MARKS)):
            raise UsageError(
                f"{out}: holds nothing that this program wrote, and only that is overwritten; "
                "remove it yourself or choose another folder"
            )
