"""The loop over shards that quantizing and merging share: continued, shared out, and ended well.

The first process owns the working folder and decides what is there already; each process makes its
part of the rest and notes every shard when it is finished; the first one finishes the job.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from irq_convert.checkpoint.disk import Staging, partial_folder, staging_folder
from irq_convert.checkpoint.files import sha256_file
from irq_convert.checkpoint.lock import join_folder
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.ending import Ending
from irq_convert.jobs.identity import Identity
from irq_convert.jobs.meeting import Meeting
from irq_convert.jobs.progress import Progress
from irq_convert.jobs.ranks import split
from irq_convert.jobs.records import (
    ShardRecord,
    begin_records,
    read_run,
    write_shard_record,
)
from irq_convert.jobs.result import hear, tell
from irq_convert.jobs.resume import Found, Resume, find_finished, trust
from irq_convert.jobs.watched import Watched

T = TypeVar("T")
_VISIBLE = 60.0
"""Seconds that a new folder may take to be seen on another host."""


@dataclass(frozen=True)
class Part:
    """One output file: its exact size, and what it counts for in the progress."""

    name: str
    nbytes: int
    work: int
    tensors: int


class Maker(Protocol):
    """Writes the file of a part into a folder, whole or not at all; returns its results, in JSON.

    They are all that the end of the job knows of the part, which an earlier run may have made.
    """

    def __call__(self, number: int, folder: Path, progress: Progress) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Job:
    """Parts to write into `out`, and what tells this run from another.

    `require` is given the bytes that are there and the numbers of the parts that each process on
    this host makes, and raises when the disk has no room for the rest; `maker` is given the numbers
    of this process's parts, in order. `phase` says in a word what is done.
    """

    out: Path
    source: Path
    overwrite: bool
    resume: Resume
    identity: Identity
    parts: tuple[Part, ...]
    require: Callable[[int, Sequence[Sequence[int]]], None]
    phase: str
    maker: Callable[[Sequence[int]], Maker]


@dataclass(frozen=True)
class Written:
    """The finished parts, by name, in `folder`; files may be added before it becomes the output."""

    folder: Path
    parts: Mapping[str, ShardRecord]

    @property
    def results(self) -> dict[str, Any]:
        """Of all parts together."""
        return {key: value for part in self.parts.values() for key, value in part.results.items()}


def run_job(
    job: Job, meeting: Meeting, kind: type[T], finish: Callable[[Written], T], progress: Progress
) -> T:
    """Make what is missing of `job`, then call `finish` in the first process; returns its result.

    The result is a `kind`, a dataclass, in all processes (`jobs.result.unpack`).
    When something fails, what is finished is kept for the next run, as `job.resume` says, and the
    error or `progress.kept` says how to go on; an `IrqError` of `finish` that the disk has no part
    in is a verdict on the result, and nothing is kept. Raises as `staging_folder`,
    `find_finished` and the maker do; in all processes when one fails.
    """
    if meeting.ranks.first:
        return _lead(job, meeting, finish, progress)
    _follow(job, meeting)
    return hear(meeting, kind)


def look(job: Job) -> Found | None:
    """What `job` would continue, by the records and sizes; nothing is changed.

    Raises `UsageError` as `find_finished`.
    """
    staging = Staging(partial_folder(job.out), keep=True)
    return find_finished(staging, job.identity, job.parts, job.resume)


def _lead(job: Job, meeting: Meeting, finish: Callable[[Written], T], progress: Progress) -> T:
    _agree(job, meeting)
    ending = Ending(job.resume, len(job.parts), meeting, progress)
    with staging_folder(job.out, job.source, job.overwrite) as staging, ending.settles(staging):
        run = _open(job, staging, progress)
        ending.begun(staging)
        written = dict(run.shards)
        missing = [n for n, part in enumerate(job.parts) if part.name not in written]
        shares = _shares(job, missing, meeting.ranks.count)
        job.require(run.nbytes, shares[: meeting.ranks.beside])  # of this host
        _begin(job, run, len(missing), meeting.ranks.count, progress)
        note = {"token": run.token, "missing": missing}
        meeting.put("go", json.dumps(note).encode())
        watched = Watched(progress, meeting)
        made: list[ShardRecord] = []
        _make(job, missing, staging, run.token, meeting, watched, made.append)
        written |= {record.name: record for record in made}
        written |= _collect(job, missing, meeting, watched)
        ending.written = True
        in_order = {part.name: written[part.name] for part in job.parts}
        result = finish(Written(staging.files, in_order))
    tell(meeting, result)
    return result


def _follow(job: Job, meeting: Meeting) -> None:
    _agree(job, meeting)
    go = json.loads(meeting.take("go"))
    staging = Staging(partial_folder(job.out), keep=True)
    _find(staging, go["token"], meeting)
    lock = join_folder(staging.root)
    try:
        watched = Watched(Progress(), meeting)

        def tell(record: ShardRecord) -> None:
            meeting.put(f"record/{record.name}", json.dumps(vars(record)).encode())

        _make(job, go["missing"], staging, go["token"], meeting, watched, tell)
        meeting.put(f"done/{meeting.ranks.rank}", b"")
    finally:
        os.close(lock)


def _agree(job: Job, meeting: Meeting) -> None:
    """Make sure that all processes are about to do the same."""
    if meeting.ranks.alone:
        return
    mine = job.identity.digest().encode()
    meeting.put(f"ready/{meeting.ranks.rank}", mine)
    for rank in range(1, meeting.ranks.count) if meeting.ranks.first else ():
        if meeting.take(f"ready/{rank}") != mine:
            raise UsageError(
                f"process {rank} of {meeting.ranks.count} has another source, options or versions "
                "than the first: give all hosts the same"
            )


def _open(job: Job, staging: Staging, progress: Progress) -> Found:
    """What there is to continue, with everything else removed; or a new run."""
    found = find_finished(staging, job.identity, job.parts, job.resume)
    if found is not None:
        found = trust(staging, found, progress)
        for name in found.damaged:
            progress.note(f"{staging.files / name}: damaged since it was written; made again")
        if found.shards:
            staging.keep_only(set(found.shards))
            return found
        if job.resume == Resume.REQUIRED:
            raise UsageError(
                f"{staging.root}: no finished shard is whole, so there is nothing to resume; leave "
                "out --resume required"
            )
    staging.clear()
    staging.keep = False
    return Found(begin_records(staging.records, job.identity), {}, ())


def _begin(job: Job, run: Found, missing: int, processes: int, progress: Progress) -> None:
    progress.phase(job.phase, sum(p.tensors for p in job.parts), sum(p.work for p in job.parts))
    if run.shards:
        done = [part for part in job.parts if part.name in run.shards]
        count = f"{len(done)} of {len(job.parts)} shards are finished"
        progress.note(f"continuing {partial_folder(job.out)}: {count}")
        progress.resumed(sum(p.tensors for p in done), sum(p.work for p in done))
    if missing < processes and not run.shards:
        progress.note(
            f"{missing} shard{'s' if missing > 1 else ''} for {processes} processes: a smaller "
            "--max-shard-size gives work to all"
        )


def _find(staging: Staging, token: str, meeting: Meeting) -> None:
    """Wait until this host sees the folder of this very run."""
    end = time.monotonic() + _VISIBLE

    def there() -> bool:
        run = read_run(staging.records)
        if run is not None and run[0] == token:
            return True
        if time.monotonic() > end:  # there may be one of another run, on a disk of this host
            raise IrqError(
                f"{staging.root}: not that of this run on this host: all hosts must share the "
                "folder that holds the output"
            )
        return False

    meeting.wait(there)


def _shares(job: Job, missing: Sequence[int], count: int) -> list[list[int]]:
    """The numbers of the parts that each of `count` processes makes."""
    runs = split([job.parts[number].nbytes for number in missing], count)
    return [[missing[at] for at in run] for run in runs]


def _make(
    job: Job,
    missing: Sequence[int],
    staging: Staging,
    token: str,
    meeting: Meeting,
    progress: Progress,
    finished: Callable[[ShardRecord], None],
) -> None:
    """Make this process's share of the parts `missing`, and tell `finished` what is recorded.

    A checksum is taken while the next part is made.
    """
    mine = _shares(job, missing, meeting.ranks.count)[meeting.ranks.rank]
    make = job.maker(mine)

    def record(part: Part, results: Mapping[str, Any]) -> ShardRecord:
        sha256 = sha256_file(staging.files / part.name)
        noted = ShardRecord(part.name, part.nbytes, sha256, results)
        write_shard_record(staging.records, token, noted)
        return noted

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="irq-checksum") as pool:
        before: Future[ShardRecord] | None = None
        for number in mine:
            results = make(number, staging.files, progress)
            if before is not None:
                finished(before.result())
            before = pool.submit(record, job.parts[number], results)
        if before is not None:
            finished(before.result())


def _collect(
    job: Job, missing: Sequence[int], meeting: Meeting, progress: Watched
) -> dict[str, ShardRecord]:
    """Wait for the other processes; returns what they have made."""
    others = range(1, meeting.ranks.count)
    meeting.wait(lambda: progress.look() or all(meeting.has(f"done/{n}") for n in others))
    found = {}
    for number in (n for share in _shares(job, missing, meeting.ranks.count)[1:] for n in share):
        name = job.parts[number].name
        found[name] = ShardRecord(**json.loads(meeting.get(f"record/{name}")))
    return found
