"""The folder of a calibration beside its output: finished layers, and the states of the next one.

    <out>.calibration/files/layer-00000.safetensors   the packed weights of a layer
    <out>.calibration/records/...                     what is finished (`jobs.common.records`)
    <out>.calibration/states/...                      hidden states, of one layer or two

A layer counts once its record is there, which is after its weights and the states behind it have
reached the disk. What a killed run leaves is continued from the first layer without a record.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from irq_convert.checkpoint.disk import Staging, partial_folder
from irq_convert.checkpoint.files import write_bytes_atomic
from irq_convert.checkpoint.layout import LOCK_NAME
from irq_convert.checkpoint.lock import Held, take_folder, unused
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.identity import Identity
from irq_convert.jobs.common.records import ShardRecord, begin_records, write_shard_record
from irq_convert.jobs.common.resume import Output, Resume, find_finished, verify_finished
from irq_convert.progress import Progress

_SUFFIX, _STATES, _FINISHED = ".calibration", "states", "finished"


def calibration_folder(out: Path, number: int = 0) -> Path:
    """The folder `<out>.calibration`, or one with a number where several choices are tried."""
    with os_errors("look at it", out):
        real = Path(out).resolve()
    return real.with_name(f"{real.name}{_SUFFIX}{f'-{number}' if number else ''}")


@dataclass
class Workspace:
    """The folder of one calibration, locked: `done` are the records of its first layers."""

    staging: Staging
    token: str
    done: list[ShardRecord]

    @property
    def files(self) -> Path:
        """Where the weights of layers are."""
        return self.staging.files

    @property
    def states(self) -> Path:
        """Where hidden states are."""
        return self.staging.root / _STATES

    def note(self, record: ShardRecord) -> None:
        """A layer is finished, and its files have been flushed."""
        write_shard_record(self.staging.records, self.token, record)
        self.done.append(record)


@contextmanager
def workspace(
    out: Path,
    identity: Identity,
    layers: Sequence[Output],
    resume: Resume,
    progress: Progress,
    number: int = 0,
) -> Iterator[Workspace]:
    """Lend the folder of the calibration for `out`, with what an earlier run of it has finished.

    When the block ends well the folder is removed; when it fails, it is kept if a layer is finished
    and `resume` allows, and the error or `progress.kept` says so. Raises `UsageError` when another
    run holds it or has left another calibration there, and `IrqError` when the disk refuses.
    """
    root = calibration_folder(out, number)
    held = Held()
    work: Workspace | None = None
    try:
        with os_errors("create it", root.parent):
            root.parent.mkdir(parents=True, exist_ok=True)
        take_folder(root, held)
        work = _open(Staging(root, keep=True), identity, layers, resume, progress)
        yield work
        _remove(root)
    except BaseException as error:
        line = _settle(root, work, len(layers), resume) if held.fd is not None else None
        if line and not isinstance(error, UsageError):  # the same is refused again
            line = f"{line}: the same command continues there"
        if line and isinstance(error, IrqError):
            raise type(error)(f"{error}; {line}") from error
        if line:
            progress.kept(line)
        raise
    finally:
        held.release()


def mark_finished(out: Path) -> None:
    """Note that the output is about to take its name, after which nothing here is needed."""
    for root in calibration_folders(out):
        write_bytes_atomic(root / _FINISHED, b"")


def remove_finished(out: Path) -> None:
    """Remove what a run has left that was killed when its output had taken its name."""
    for root in calibration_folders(out):
        with suppress(OSError):
            names = {path.name for path in root.iterdir()}
            marked = _FINISHED in names and not partial_folder(out).exists()
            if (marked or names <= {LOCK_NAME}) and unused(root):
                _remove(root)


def calibration_folders(out: Path) -> list[Path]:
    """All folders of calibrations for `out` that are there."""
    first = calibration_folder(out)
    numbered = (calibration_folder(out, number) for number in count(1))
    return [*filter(Path.is_dir, [first]), *takewhile(Path.is_dir, numbered)]


def _open(
    staging: Staging,
    identity: Identity,
    layers: Sequence[Output],
    resume: Resume,
    progress: Progress,
) -> Workspace:
    mode = Resume.AUTO if resume == Resume.REQUIRED else resume
    found = find_finished(staging, identity, layers, mode)
    if found is not None:
        found = verify_finished(staging, found, progress)
        done = []
        for layer in layers:
            if layer.name not in found.shards:
                break
            done.append(found.shards[layer.name])
        if done and any((staging.root / _STATES).glob(f"*-{len(done):05}")):
            staging.remove_temporary()
            return Workspace(staging, found.token, done)
    staging.clear()
    with os_errors("create it", staging.root):
        (staging.root / _STATES).mkdir()
    return Workspace(staging, begin_records(staging.records, identity), [])


def _settle(root: Path, work: Workspace | None, total: int, resume: Resume) -> str | None:
    """Keep or remove the folder of a run that failed; returns the line that says what is kept."""
    if work is None:  # refused before anything was touched
        if root.is_dir() and not (root / "records").exists():
            _remove(root)
        return None
    if not work.done or resume == Resume.NEVER:
        _remove(root)
        return None
    work.staging.remove_temporary()
    return f"{len(work.done)} of {total} layers are calibrated and kept in {root}"


def _remove(root: Path) -> None:
    """Remove the folder; what says that it is not needed, and whose it is, last."""
    with suppress(OSError):
        last = (_FINISHED, LOCK_NAME)
        for path in sorted(root.iterdir(), key=lambda path: path.name != "records"):
            if path.name in last:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for name in last:
            (root / name).unlink(missing_ok=True)
        root.rmdir()
