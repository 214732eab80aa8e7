"""What a run notes in its working folder, so that another can continue it.

    records/run.record            what the run is (`Identity`), and a token of its own
    records/<shard>.record        a finished shard: size, SHA-256, what is known of its tensors

A record is written after its shard has reached the disk under its name, whole or not at all, and
holds a hash of itself and the token of its run: a record that is damaged, or belongs to an earlier
run in the same folder, counts as none.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.files import fsync_folder, write_bytes_atomic
from irq_convert.checkpoint.system import os_errors
from irq_convert.jobs.common.identity import Identity

_SUFFIX = ".record"
RUN_NAME = f"run{_SUFFIX}"
FORMAT = 1


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard. `results` is JSON: what the final documents need of its tensors."""

    name: str
    bytes: int
    sha256: str
    results: Mapping[str, Any]


def begin_records(folder: Path, identity: Identity) -> str:
    """Make the folder of records of a new run; returns its token. `IrqError` if the disk fails."""
    token = secrets.token_hex(8)
    with os_errors("create it", folder):
        folder.mkdir()
        fsync_folder(folder.parent)
    _write(folder / RUN_NAME, {"format": FORMAT, "token": token, "run": identity.to_dict()})
    return token


def read_run(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Token and `Identity.to_dict()` of the run that wrote `folder`, None when nothing says."""
    found = _read(folder / RUN_NAME)
    if found is None or found.get("format") != FORMAT:
        return None
    token, run = found.get("token"), found.get("run")
    return (token, run) if isinstance(token, str) and isinstance(run, dict) else None


def write_shard_record(folder: Path, token: str, record: ShardRecord) -> None:
    """Note a finished shard, whose file has been flushed; `IrqError` when the disk refuses."""
    _write(folder / _record_name(record.name), {"token": token, **asdict(record)})


def read_shard_record(folder: Path, token: str, shard: str) -> ShardRecord | None:
    """What was noted of `shard` by the run of `token`; None when nothing whole was."""
    found = _read(folder / _record_name(shard))
    if found is None or found.pop("token", None) != token or found.get("name") != shard:
        return None
    try:
        return ShardRecord(**found)
    except TypeError:
        return None


def has_shard_record(folder: Path, shard: str) -> bool:
    """Whether anything was noted of `shard`, whole or not."""
    return (folder / _record_name(shard)).exists()


def list_shard_records(folder: Path) -> list[str]:
    """Names of the shards of which anything was noted, sorted."""
    with os_errors("list it", folder):
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(n.removesuffix(_SUFFIX) for n in names if n.endswith(_SUFFIX) and n != RUN_NAME)


def _record_name(shard: str) -> str:
    return f"{shard}{_SUFFIX}"


def _write(path: Path, body: Mapping[str, Any]) -> None:
    text = json.dumps(body)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_bytes_atomic(path, f"{digest}\n{text}\n".encode())


def _read(path: Path) -> dict[str, Any] | None:
    """The body of a record, None for one that is missing or not as it was written."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        with os_errors("read it", path):
            raise error
    digest, _, text = raw.partition(b"\n")
    text = text.removesuffix(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return None
    body = json.loads(text)
    return body if isinstance(body, dict) else None
