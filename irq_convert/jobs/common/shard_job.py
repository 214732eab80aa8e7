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
from irq_convert.checkpoint.planned_folder import PlannedFolder, checksums
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.ending import Ending
from irq_convert.jobs.common.identity import Identity
from irq_convert.jobs.common.ranks import split
from irq_convert.jobs.common.records import (
    ShardRecord,
    begin_records,
    read_run,
    write_shard_record,
)
from irq_convert.jobs.common.result import broadcast_result, receive_result
from irq_convert.jobs.common.resume import FinishedShards, Resume, find_finished, verify_finished
from irq_convert.jobs.common.shared_progress import SharedProgress
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.progress import Progress

T = TypeVar("T")
_VISIBLE = 60.0
"""Seconds that a new folder may take to be seen on another host."""


@dataclass(frozen=True)
class OutputShard:
    """One output file: its exact size, and what it counts for in the progress."""

    name: str
    nbytes: int
    work: int
    tensors: int


class ShardMaker(Protocol):
    """Writes a shard into a folder, whole or not at all; returns its results, in JSON.

    They are all that the end of the job knows of the shard, which an earlier run may have made.
    """

    def __call__(self, number: int, folder: Path, progress: Progress) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class ShardJob:
    """Shards to write into `out`, and what tells this run from another.

    `require` is given the bytes that are there and the numbers of the shards that each process on
    this host makes, and raises when the disk has no room for the rest; `maker` is given the numbers
    of this process's shards, in order. `phase` says in a word what is done.
    """

    out: Path
    source: Path
    overwrite: bool
    resume: Resume
    identity: Identity
    shards: tuple[OutputShard, ...]
    require: Callable[[int, Sequence[Sequence[int]]], None]
    phase: str
    maker: Callable[[Sequence[int]], ShardMaker]


@dataclass(frozen=True)
class WrittenShards:
    """The finished shards, by name, in `folder`, which becomes the output when the job ends."""

    folder: Path
    shards: Mapping[str, ShardRecord]

    @property
    def results(self) -> dict[str, Any]:
        """Of all shards together."""
        return {
            key: value for shard in self.shards.values() for key, value in shard.results.items()
        }

    def write_rest(self, planned: PlannedFolder[Any]) -> dict[str, dict[str, Any]]:
        """Write the files of `planned` beside the shards; returns size and SHA-256 of all files."""
        shards = self.shards.values()
        found = {each.name: {"bytes": each.bytes, "sha256": each.sha256} for each in shards}
        return found | checksums(self.folder, planned.write_rest(self.folder))


def run_shard_job(
    job: ShardJob,
    processes: RunProcesses,
    kind: type[T],
    finish: Callable[[WrittenShards], T],
    progress: Progress,
) -> T:
    """Make what is missing of `job`, then call `finish` in the first process; returns its result.

    The result is a `kind`, a dataclass, in all processes (`jobs.common.result.unpack`).
    When something fails, what is finished is kept for the next run, as `job.resume` says, and the
    error or `progress.kept` says how to go on; an `IrqError` of `finish` that the disk has no part
    in is a verdict on the result, and nothing is kept. Raises as `staging_folder`,
    `find_finished` and the maker do; in all processes when one fails.
    """
    if processes.ranks.first:
        return _lead(job, processes, finish, progress)
    _follow(job, processes)
    return receive_result(processes, kind)


def scan_finished(job: ShardJob) -> FinishedShards | None:
    """What `job` would continue, by the records and sizes; nothing is changed.

    Raises `UsageError` as `find_finished`.
    """
    staging = Staging(partial_folder(job.out), keep=True)
    return find_finished(staging, job.identity, job.shards, job.resume)


def _lead(
    job: ShardJob, processes: RunProcesses, finish: Callable[[WrittenShards], T], progress: Progress
) -> T:
    _agree(job, processes)
    ending = Ending(job.resume, len(job.shards), processes, progress)
    with staging_folder(job.out, job.source, job.overwrite) as staging, ending.settles(staging):
        run = _open(job, staging, progress)
        ending.begun(staging)
        written = dict(run.shards)
        missing = [n for n, shard in enumerate(job.shards) if shard.name not in written]
        shares = _shares(job, missing, processes.ranks.count)
        job.require(run.nbytes, shares[: processes.ranks.beside])  # of this host
        _begin(job, run, len(missing), processes.ranks.count, progress)
        note = {"token": run.token, "missing": missing}
        processes.put("go", json.dumps(note).encode())
        watched = SharedProgress(progress, processes)
        made: list[ShardRecord] = []
        _make(job, missing, staging, run.token, processes, watched, made.append)
        written |= {record.name: record for record in made}
        written |= _collect(job, missing, processes, watched)
        ending.written = True
        in_order = {shard.name: written[shard.name] for shard in job.shards}
        result = finish(WrittenShards(staging.files, in_order))
    broadcast_result(processes, result)
    return result


def _follow(job: ShardJob, processes: RunProcesses) -> None:
    _agree(job, processes)
    go = json.loads(processes.take("go"))
    staging = Staging(partial_folder(job.out), keep=True)
    _find(staging, go["token"], processes)
    lock = join_folder(staging.root)
    try:
        watched = SharedProgress(Progress(), processes)

        def publish(record: ShardRecord) -> None:
            processes.put(f"record/{record.name}", json.dumps(vars(record)).encode())

        _make(job, go["missing"], staging, go["token"], processes, watched, publish)
        processes.put(f"done/{processes.ranks.rank}", b"")
    finally:
        os.close(lock)


def _agree(job: ShardJob, processes: RunProcesses) -> None:
    """Make sure that all processes are about to do the same."""
    if processes.ranks.alone:
        return
    mine = job.identity.digest().encode()
    processes.put(f"ready/{processes.ranks.rank}", mine)
    for rank in range(1, processes.ranks.count) if processes.ranks.first else ():
        if processes.take(f"ready/{rank}") != mine:
            raise UsageError(
                f"process {rank} of {processes.ranks.count} has another source, options or "
                "versions than the first: give all hosts the same"
            )


def _open(job: ShardJob, staging: Staging, progress: Progress) -> FinishedShards:
    """What there is to continue, with everything else removed; or a new run."""
    found = find_finished(staging, job.identity, job.shards, job.resume)
    if found is not None:
        found = verify_finished(staging, found, progress)
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
    return FinishedShards(begin_records(staging.records, job.identity), {}, ())


def _begin(
    job: ShardJob, run: FinishedShards, missing: int, processes: int, progress: Progress
) -> None:
    progress.phase(job.phase, sum(s.tensors for s in job.shards), sum(s.work for s in job.shards))
    if run.shards:
        done = [shard for shard in job.shards if shard.name in run.shards]
        count = f"{len(done)} of {len(job.shards)} shards are finished"
        progress.note(f"continuing {partial_folder(job.out)}: {count}")
        progress.resumed(sum(s.tensors for s in done), sum(s.work for s in done))
    if missing < processes and not run.shards:
        progress.note(
            f"{missing} shard{'s' if missing > 1 else ''} for {processes} processes: a smaller "
            "--max-shard-size gives work to all"
        )


def _find(staging: Staging, token: str, processes: RunProcesses) -> None:
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

    processes.wait(there)


def _shares(job: ShardJob, missing: Sequence[int], count: int) -> list[list[int]]:
    """The numbers of the shards that each of `count` processes makes."""
    runs = split([job.shards[number].nbytes for number in missing], count)
    return [[missing[at] for at in run] for run in runs]


def _make(
    job: ShardJob,
    missing: Sequence[int],
    staging: Staging,
    token: str,
    processes: RunProcesses,
    progress: Progress,
    finished: Callable[[ShardRecord], None],
) -> None:
    """Make this process's share of the shards `missing`, and tell `finished` what is recorded.

    A checksum is taken while the next shard is made.
    """
    mine = _shares(job, missing, processes.ranks.count)[processes.ranks.rank]
    make = job.maker(mine)

    def record(shard: OutputShard, results: Mapping[str, Any]) -> ShardRecord:
        sha256 = sha256_file(staging.files / shard.name)
        noted = ShardRecord(shard.name, shard.nbytes, sha256, results)
        write_shard_record(staging.records, token, noted)
        return noted

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="irq-checksum") as pool:
        before: Future[ShardRecord] | None = None
        for number in mine:
            results = make(number, staging.files, progress)
            if before is not None:
                finished(before.result())
            before = pool.submit(record, job.shards[number], results)
        if before is not None:
            finished(before.result())


def _collect(
    job: ShardJob, missing: Sequence[int], processes: RunProcesses, progress: SharedProgress
) -> dict[str, ShardRecord]:
    """Wait for the other processes; returns what they have made."""
    others = range(1, processes.ranks.count)
    processes.wait(lambda: progress.look() or all(processes.has(f"done/{n}") for n in others))
    found = {}
    for number in (n for share in _shares(job, missing, processes.ranks.count)[1:] for n in share):
        name = job.shards[number].name
        found[name] = ShardRecord(**json.loads(processes.get(f"record/{name}")))
    return found
