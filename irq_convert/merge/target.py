"""Where a merge or an export may write: a new folder, or one that this program made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from irq_convert.adapters.settings import NOTE_FILE
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.checkpoint.disk import check_output
from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.checkpoint.source import read_json_object
from irq_convert.checkpoint.system import existing_parent, os_errors
from irq_convert.errors import UsageError
from irq_convert.merge.plan import MERGE_NAME

EXPORT_NAME = "irq_export.json"
"""The note that every exported folder holds."""
MARKS = (MANIFEST_NAME, MERGE_NAME, EXPORT_NAME)
"""Files of which each says that this program made the folder from others."""


def check_target(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse an `out` that cannot be written before anything is read.

    Raises `UsageError` as `check_output` does against each of `inputs`, for a path that leads
    through a file, and for a folder that holds anything but such a result: --overwrite deletes it.
    """
    for folder in inputs:
        check_output(out, folder, overwrite)
    with os_errors("look at it", out):
        real = out.resolve()
        parent = existing_parent(real)
        if not parent.is_dir():
            raise UsageError(f"{out}: {parent} is a file, not a folder; choose another output")
        if real.is_dir() and any(real.iterdir()) and not _is_result(real):
            raise UsageError(
                f"{out}: holds no result of quantizing, merging or exporting, and only those are "
                "overwritten; remove it yourself or choose another folder"
            )


def _is_result(folder: Path) -> bool:
    """Whether it can be made again; an adapter that was trained, not folded, cannot be."""
    if any((folder / mark).is_file() for mark in MARKS):
        return True
    note = folder / NOTE_FILE
    return note.is_file() and "folded_from" in read_json_object(note)


def folder_bytes(folder: Path) -> int:
    """Size of all files of a result while it is being written, without the lock."""
    with os_errors("look at its files", folder):
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME)
        return sum(path.stat().st_size for path in files)
