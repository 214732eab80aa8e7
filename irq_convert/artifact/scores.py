"""Scores of a model or an adapter on tasks, kept beside it: `irq_scores.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter import adapter_identity
from irq_convert.artifact.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from irq_convert.artifact.identity import artifact_identity
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.results import MARKS
from irq_convert.checkpoint.files import write_json_atomic
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.layout import SCORES_NAME
from irq_convert.errors import IrqError
from irq_convert.version import PRODUCER

FORMAT, FORMAT_VERSION = "irq-scores", 1
SAME = ("task", "metric", "filter", "fewshot", "limit", "chat")
"""What makes a score one that replaces an earlier one."""


def keeps_scores(folder: Path) -> bool:
    """Whether `folder` is what this program has made: an artifact, another result, an adapter."""
    names = (*MARKS, WEIGHTS_FILE)
    return any((folder / name).is_file() for name in names)


def weights_identity(folder: Path) -> str | None:
    """Which weights a score was measured on: the identity of an artifact or an adapter.

    None for other results, which are never changed in place. Raises `IrqError` where its files
    cannot be read.
    """
    if (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
        return adapter_identity(folder)
    return artifact_identity(folder) if (folder / MANIFEST_NAME).is_file() else None


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The scores kept in `folder`, of the weights that it holds now; those of others are left out.

    Raises `IrqError` for a file that is not such a list.
    """
    path = folder / SCORES_NAME
    if not path.is_file():
        return []
    found = read_json_object(path)
    rows: Any = found.get("scores")
    if found.get("format") != FORMAT or not _is_rows(rows):
        raise IrqError(f"{path}: holds no scores of eval --tasks: remove it")
    return list(rows) if found.get("sha256") == weights_identity(folder) else []


def keep_scores(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `rows` beside what they were measured on; they replace those of the same tasks.

    Raises `IrqError` where the file that is there is no list of scores, or the disk refuses.
    """
    new = [dict(row) for row in rows]
    again = {_key(row) for row in new}
    kept = [row for row in read_scores(folder) if _key(row) not in again]
    path = folder / SCORES_NAME
    write_json_atomic(
        path,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "producer": PRODUCER,
            "sha256": weights_identity(folder),
            "scores": [*kept, *new],
        },
    )
    return path


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in SAME)


def _is_rows(rows: object) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("task"), str)
        and isinstance(row.get("metric"), str)
        and isinstance(row.get("value"), int | float)
        for row in rows
    )
