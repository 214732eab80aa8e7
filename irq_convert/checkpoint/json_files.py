"""Reading JSON strictly: no key twice; and the small JSON files beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError


class DuplicateKeyError(ValueError):
    """A JSON object names the same key twice."""


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for `json.loads(object_pairs_hook=...)`, refusing a key given twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKeyError(f"{twice!r} appears twice")
    return result


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object; `IrqError` names the file otherwise."""
    with os_errors("read it", path):
        raw = path.read_bytes()
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_pairs)
    except DuplicateKeyError as error:
        raise IrqError(f"{path}: {error} in the file; remove the wrong one") from error
    except (ValueError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise IrqError(f"{path}: not JSON ({detail}); correct it or download it again") from error
    if not isinstance(value, dict):
        raise IrqError(f"{path}: holds a JSON {type(value).__name__}, an object is needed")
    return value
