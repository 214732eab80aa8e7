"""The files of an artifact against the sizes and checksums in its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from irq_convert.artifact.manifest import CARD_NAME, MANIFEST_NAME, is_listed
from irq_convert.artifact.structure import WAY_OUT
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.layout import is_hidden
from irq_convert.errors import IrqError

THREADS = 4
"""Files hashed at a time: enough for a fast disk, few for a slow one."""


def check_files(
    folder: Path, listed: Mapping[str, Any], advance: Callable[[int], None]
) -> dict[str, str]:
    """One line by name for each file that is missing, changed or not `listed` (name: entry).

    The model card may say anything. Hidden files, which version control and Hub downloads add, may
    be there unlisted. `advance` is told the bytes of each file that was read.
    """
    problems: dict[str, str] = {}

    def check(name: str) -> str | None:
        found = _problem(folder, name, listed[name])
        advance(_listed_bytes(listed[name]))
        return found

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for name, found in zip(listed, pool.map(check, listed), strict=True):
            if found is not None:
                problems[name] = found
    problems.pop(CARD_NAME, None)  # earlier versions listed the source's
    for name in list_files(folder):
        if name not in listed and is_listed(name):
            problems[name] = (
                f"{name}: not part of the artifact ({MANIFEST_NAME} does not list it): remove it"
            )
    return problems


def files_bytes(listed: Mapping[str, Any]) -> int:
    """Bytes of all files, by the manifest."""
    return sum(map(_listed_bytes, listed.values()))


def list_files(folder: Path) -> list[str]:
    """Sorted relative paths of the files in `folder`, hidden ones left out."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        base = Path(root).relative_to(folder)
        found += [(base / name).as_posix() for name in names if not _is_hidden(name)]
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or is_hidden(name)


def _listed_bytes(entry: Any) -> int:
    size = entry.get("bytes") if isinstance(entry, Mapping) else None
    return size if type(size) is int and size >= 0 else 0


def _problem(folder: Path, name: str, entry: Any) -> str | None:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        return f"{MANIFEST_NAME}: lists {name!r}, which is not inside the folder: {WAY_OUT}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("sha256"), str):
        return f"{MANIFEST_NAME}: has no size and sha256 of {name}: {WAY_OUT}"
    path = folder / name
    if not path.is_file():
        return f"{name}: missing, though {MANIFEST_NAME} lists it: {WAY_OUT}"
    try:
        size = path.stat().st_size
        if size != entry.get("bytes"):
            return f"{name}: has {size} bytes, not the {entry.get('bytes')} written: {WAY_OUT}"
        found = sha256_file(path)
    except IrqError as error:
        return str(error)
    if found != entry["sha256"]:
        return f"{name}: changed: sha256 {found}, not the {entry['sha256']} written: {WAY_OUT}"
    return None
