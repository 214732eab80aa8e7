"""What an earlier run has left: found, compared with what is asked for, and trusted or not.

A power cut or a kill leaves a finished shard or none: it is flushed before it is given its name,
and recorded after. What a disk has lost or changed since then shows when its checksum is taken
again, which is little work next to making it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from irq_convert.checkpoint.disk import Staging
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import UsageError
from irq_convert.jobs.common.identity import Identity, differences
from irq_convert.jobs.common.records import (
    ShardRecord,
    has_shard_record,
    list_shard_records,
    read_run,
    read_shard_record,
)
from irq_convert.progress import Progress

_THREADS = 4


class Resume(StrEnum):
    """Whether a run continues what an earlier one has left.

    AUTO does where there is something, REQUIRED fails where there is nothing, NEVER starts anew and
    keeps nothing when it fails.
    """

    AUTO = "auto"
    REQUIRED = "required"
    NEVER = "never"


class Output(Protocol):
    """A file that a run writes: its name and exact size."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class FinishedShards:
    """A run to continue: its token, its finished shards, and those recorded but not whole."""

    token: str
    shards: Mapping[str, ShardRecord]
    damaged: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(record.bytes for record in self.shards.values())


def find_finished(
    staging: Staging, identity: Identity, outputs: Sequence[Output], mode: Resume
) -> FinishedShards | None:
    """What the folder `staging` holds of the run `identity`; None when there is nothing.

    Nothing is changed, and of the files only sizes are looked at. Raises `UsageError` when another
    run, or the same with another source, has left finished shards there, or when `mode` requires
    what is not there.
    """
    known = None if mode == Resume.NEVER else read_run(staging.records)
    listed = [] if known is None else list_shard_records(staging.records)
    if known is None or not listed or not staging.files.is_dir():
        if mode == Resume.REQUIRED:
            raise nothing_to_resume(staging)
        return None
    token, before = known
    _refuse_another(staging, len(listed), before, identity.to_dict())
    shards, damaged = {}, []
    for output in outputs:
        record = read_shard_record(staging.records, token, output.name)
        if record is not None and _size(staging.files / output.name) == output.nbytes:
            shards[output.name] = record
        elif has_shard_record(staging.records, output.name):
            damaged.append(output.name)
    return FinishedShards(token, shards, tuple(damaged))


def refuse_another_run(staging: Staging, identity: Identity) -> None:
    """Raise `UsageError` where `staging` holds finished shards of a run that cannot be `identity`.

    For a run that finds out on its way what else it is: options that `identity` lacks and the plan
    are not compared.
    """
    known = read_run(staging.records)
    listed = [] if known is None else list_shard_records(staging.records)
    if known is None or not listed:
        return
    now, before = identity.to_dict(), dict(known[1])
    options = before.get("options")
    if isinstance(options, Mapping):
        before["options"] = {key: options[key] for key in options if key in now["options"]}
    before["plan"] = now["plan"]
    _refuse_another(staging, len(listed), before, now)


def nothing_to_resume(staging: Staging) -> UsageError:
    """What is raised where a run is required that is not there."""
    return UsageError(
        f"{staging.root}: holds no finished shard, so there is nothing to resume; leave out "
        "--resume required"
    )


def _refuse_another(
    staging: Staging, finished: int, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    changed = differences(before, now)
    if not changed:
        return
    more = f"; and {len(changed) - 3} more" if changed[3:] else ""
    count = f"{finished} finished shard{'s' if finished > 1 else ''}"
    raise UsageError(
        f"{staging.root}: holds {count} of another run: {'; '.join(changed[:3])}{more}; ask for "
        "the same again, or start anew with --resume never"
    )


def _size(path: Path) -> int | None:
    with os_errors("look at it", path):
        return path.stat().st_size if path.is_file() and not path.is_symlink() else None


def verify_finished(staging: Staging, found: FinishedShards, progress: Progress) -> FinishedShards:
    """`found` without the shards whose files are no longer what was written."""
    names = list(found.shards)
    progress.phase("checking finished shards", len(names), found.nbytes)
    right: dict[str, ShardRecord] = {}
    damaged = list(found.damaged)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="irq-checksum") as pool:
        sums = pool.map(sha256_file, [staging.files / name for name in names])
        for name, sha256 in zip(names, sums, strict=True):
            record = found.shards[name]
            progress.advance(record.bytes, finished=True)
            if sha256 == record.sha256:
                right[name] = record
            else:
                damaged.append(name)
    return FinishedShards(found.token, right, tuple(sorted(damaged)))
