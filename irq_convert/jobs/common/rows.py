"""Rows of a data file: JSON or JSONL into dictionaries, each with the place it came from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.errors import IrqError
from irq_convert.jobs.common.text import read_text

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class DataRow:
    """One object of the file; `where` names file and row for messages."""

    where: str
    fields: dict[str, Any]


def holds_rows(path: Path) -> bool:
    """Whether the name of `path` says JSON or JSONL; all else is plain text."""
    return path.suffix.lower() in JSON_SUFFIXES


def read_rows(path: Path) -> list[DataRow]:
    """The rows of a JSON array or of JSON lines, whichever the file holds; blank lines are skipped.

    Raises `UsageError` where there is no such file; `IrqError` where it cannot be read, is empty,
    not UTF-8 or not JSON (with the line), or an element is no object (with the row).
    """
    text = read_text(path)
    head = text.lstrip()[:1]
    if not head:
        raise IrqError(f"{path}: the file is empty but for white space; give a file with rows")
    rows = _array(path, text) if head == "[" else _lines(path, text)
    if not rows:
        raise IrqError(f"{path}: an empty array; give a file with rows")
    return rows


def _array(path: Path, text: str) -> list[DataRow]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise IrqError(
            f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}; mend the "
            "file, or name it .txt if it is plain text"
        ) from None
    except RecursionError:
        raise IrqError(f"{path}: not rows: JSON nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise IrqError(f"{path}: not rows: {error}") from None
    return [_row(f"{path}: row {number}", item) for number, item in enumerate(found, 1)]


def _lines(path: Path, text: str) -> list[DataRow]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise IrqError(
                f"{path}: line {number} is not JSON: {error.msg} (column {error.colno}); one "
                "object a line is needed, or an array of objects"
            ) from None
        except RecursionError:
            raise IrqError(f"{path}: line {number} is not a row: nested too deeply") from None
        except ValueError as error:  # a number of thousands of digits
            raise IrqError(f"{path}: line {number} is not a row: {error}") from None
        rows.append(_row(f"{path}: line {number}", item))
    return rows


def _row(where: str, item: Any) -> DataRow:
    if not isinstance(item, dict):
        kind = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
        raise IrqError(f"{where}: {kind.get(type(item), 'a number')}, not an object with fields")
    return DataRow(where, item)
