"""What a result of this program is: the notes that tell it, what may be overwritten, its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter_config import NOTE_FILE
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.checkpoint.disk import check_output
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.checkpoint.system import existing_parent, os_errors, require_utf8
from irq_convert.errors import UsageError

MERGE_NAME = "irq_merge.json"
"""The note beside a dense model that an adapter was merged into."""
EXPORT_NAME = "irq_export.json"
"""The note that every exported folder holds."""
MARKS = (MANIFEST_NAME, MERGE_NAME, EXPORT_NAME)
"""Files of which each says that this program made the folder from others."""


def check_result_folder(
    out: Path, inputs: Sequence[Path], overwrite: bool, *, artifacts_only: bool = False
) -> None:
    """Refuse an `out` that cannot be written before anything is read, downloaded or computed.

    Raises `UsageError` as `check_output` does against each of `inputs`, for a path that leads
    through a file, and for a folder that holds anything but a result (with `artifacts_only`,
    anything but an artifact): --overwrite deletes what it replaces. `IrqError` for a path that is
    not UTF-8.
    """
    for folder in inputs:
        check_output(out, folder, overwrite)
    check_output(out, None, overwrite)
    require_utf8(out, str(out))
    with os_errors("look at it", out):
        real = out.resolve()
        parent = existing_parent(real)
        if not parent.is_dir():
            raise UsageError(f"{out}: {parent} is a file, not a folder; choose another output")
        if not real.is_dir() or not any(real.iterdir()):
            return
        if artifacts_only and not (real / MANIFEST_NAME).is_file():
            raise UsageError(
                f"{out}: holds no artifact, and only artifacts are overwritten; remove it "
                "yourself or choose another folder"
            )
        if not _is_result(real):
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


def describe_base(model: str, identity: str, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """The artifact that a result was made from: its name, its identity, what it was made from.

    `model` is a Hub id, or the name of a folder without its path.
    """
    return {
        "model": model,
        "sha256": identity,
        "source": None if manifest is None else manifest["source"],
    }


def folder_bytes(folder: Path) -> int:
    """Size of all files of a result while it is being written, without the lock."""
    with os_errors("look at its files", folder):
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME)
        return sum(path.stat().st_size for path in files)
