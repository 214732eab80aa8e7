"""What has to be the same for a run to be continued, or to be shared: source, options, version.

A repository on the Hub is told by its commit. A local source is told, file by file, by its size,
its time of modification and a hash of its header and of samples of its data. Hashing all of it
would take as long as reading it again, which is most of the work of a fast conversion. Whoever
rewrites a file changes its time; whoever puts another model of the same shapes in its place and
keeps the time, as archives do, changes nearly every number in it, and so the samples.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.header import MAX_HEADER_BYTES
from irq_convert.checkpoint.system import os_errors
from irq_convert.version import PRODUCER

SAMPLES = 64
SAMPLE_BYTES = 4096
_ZIP = b"PK\x03\x04"
_START = 1 << 20
"""Bytes at the start of a file that is not safetensors: of a pickle, all but the numbers."""
_TIME = "mtime_ns"
_HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Identity:
    """One run, in JSON: what it does, to which source, with which options, as which plan.

    `source` describes the source for the records of the result; `files` are the fingerprints of
    its local files, empty for a commit of the Hub. `options` are those that decide a byte, by the
    names that a person knows. `plan` is `plan_digest`.
    """

    job: str
    source: Mapping[str, Any]
    options: Mapping[str, Any]
    plan: str
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    producer: str = PRODUCER

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON gives them back."""
        found = {
            "producer": self.producer,
            "job": self.job,
            "source": self.source,
            "files": self.files,
            "options": self.options,
            "plan": self.plan,
        }
        return dict(json.loads(json.dumps(found)))

    def digest(self) -> str:
        """Equal in all processes of one run; hosts may have copies of the source of other ages."""
        found = self.to_dict()
        for entry in found["files"].values():
            entry.pop(_TIME, None)
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def plan_digest(shards: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over names and headers of the output files: every tensor's fate, and the order."""
    digest = hashlib.sha256()
    for name, header in shards:
        digest.update(f"{name}\t{hashlib.sha256(header).hexdigest()}\n".encode())
    return digest.hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in two `Identity.to_dict()`, in words; empty when all is."""
    if before.get("producer") != now["producer"]:
        return [f"it was begun by {before.get('producer')}, this is {now['producer']}"]
    found = [*_changed("", before, now, ["job"])]
    found += _changed("", before.get("options"), now["options"])
    found += _changed("the source's ", before.get("source"), now["source"])
    found += _files(before.get("files"), now["files"])
    if not found and before.get("plan") != now["plan"]:
        found.append(
            "the same tensors are no longer quantized or stored alike (another version of "
            "transformers, or another config.json)"
        )
    return found


def _changed(what: str, before: Any, now: Mapping[str, Any], keys: Any = None) -> Iterable[str]:
    old = before if isinstance(before, Mapping) else {}
    for key in keys or sorted({*old, *now}):
        if old.get(key) != now.get(key):
            name = key.replace("_", " ")
            yield f"{what}{name} was {_short(old.get(key))} and is {_short(now.get(key))} now"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if _HASH.fullmatch(text):
        return text[:12]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _files(before: Any, now: Mapping[str, Any]) -> Iterable[str]:
    old = before if isinstance(before, Mapping) else {}
    for name in sorted({*old, *now}):
        was, is_now = old.get(name), now.get(name)
        if was == is_now:
            continue
        if was is None or is_now is None:
            yield f"{name} of the source is {'new' if was is None else 'gone'}"
        elif was.get("bytes") != is_now["bytes"]:
            yield f"{name} of the source had {was.get('bytes')} bytes and has {is_now['bytes']} now"
        elif was.get("sha256") != is_now["sha256"]:
            yield f"{name} of the source has other contents"
        else:
            yield f"{name} of the source was written again"


def fingerprint_files(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size, time of modification and sampled hash of each file, by its name in `folder`.

    Raises `IrqError` when a file cannot be read.
    """
    return {path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths}


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with os_errors("read it", path), path.open("rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        start = os.pread(file.fileno(), 8, 0)
        length = int.from_bytes(start, "little")
        if start.startswith(_ZIP) or length > MAX_HEADER_BYTES:
            length = _START
        header = 8 + min(length, stat.st_size)
        at = 0
        while at < header and (piece := os.pread(file.fileno(), min(header - at, 1 << 20), at)):
            digest.update(piece)
            at += len(piece)
        room = max(0, stat.st_size - header - SAMPLE_BYTES)
        for place in sorted({header + room * n // (SAMPLES - 1) for n in range(SAMPLES)}):
            digest.update(os.pread(file.fileno(), SAMPLE_BYTES, place))
    return {"bytes": stat.st_size, _TIME: stat.st_mtime_ns, "sha256": digest.hexdigest()}
