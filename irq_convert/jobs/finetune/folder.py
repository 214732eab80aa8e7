"""The adapter folder while a run writes to it, and after.

`ADAPTER/.training/` holds the state of an unfinished run: `run.json` says which, `checkpoint-N/`
is the newest whole state and `writing/` one that is being written; `teacher.safetensors` are the
logits of a teacher, which tell themselves what they are of and serve any run. All of it is removed
when the run is finished. The adapter's own files appear above it, each whole, the configuration
last: without that nothing takes the folder for an adapter.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irq_convert.artifact.adapter_config import CONFIG_FILE, NOTE_FILE, WEIGHTS_FILE
from irq_convert.checkpoint.disk import check_output
from irq_convert.checkpoint.files import fsync_folder, write_json_atomic
from irq_convert.checkpoint.json_files import read_json_object
from irq_convert.checkpoint.system import os_errors
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.finetune.curve import CSV_NAME, PNG_NAME
from irq_convert.jobs.finetune.report import INTERRUPTED

STATE = ".training"
RUN = "run.json"
BEFORE = "before.json"
LOGITS = "teacher.safetensors"
_LOCK = ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """An adapter folder that this process may write to; `resuming` when it continues a run."""

    path: Path
    resuming: bool
    older: bool = False
    """Whether a finished adapter lies there, which the run is to replace."""

    @property
    def state(self) -> Path:
        return self.path / STATE

    @property
    def writing(self) -> Path:
        """Where the next checkpoint is written before it counts."""
        return self.state / "writing"

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        return newest_checkpoint(self.path)

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the state, None where there is none."""
        path = self.state / name
        return read_json_object(path) if path.is_file() else None

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON object of the state, whole or not at all."""
        write_json_atomic(self.state / name, content)

    def accept_checkpoint(self, step: int) -> None:
        """Make what lies in `writing` the newest checkpoint; older ones are removed."""
        made, final = self.writing / f"checkpoint-{step}", self.state / f"checkpoint-{step}"
        with os_errors("keep the checkpoint", final):
            flush_folder(made)
            if final.exists():
                shutil.rmtree(final)
            made.rename(final)
            fsync_folder(self.state)
            for path in self.state.iterdir():
                if _CHECKPOINT.fullmatch(path.name) and path != final:
                    shutil.rmtree(path)

    def publish(self, adapter: Path, note: dict[str, Any]) -> None:
        """Move the adapter files from the folder `adapter` to their place, with the note."""
        with os_errors("put the adapter there", self.path):
            # All is on the disk before the older adapter is touched.
            write_json_atomic(adapter / NOTE_FILE, note)
            flush_folder(adapter)
            mode = (adapter / NOTE_FILE).stat().st_mode  # as the user's umask has it
            # An older adapter's settings must never stand beside the new note or weights.
            (self.path / CONFIG_FILE).unlink(missing_ok=True)
            for name in (NOTE_FILE, WEIGHTS_FILE, CONFIG_FILE):
                (adapter / name).chmod(mode)
                (adapter / name).replace(self.path / name)
            fsync_folder(self.path)
            shutil.rmtree(adapter)

    def withdraw(self) -> None:
        """Give up the run: its state goes but for a teacher's logits, and an adapter that it has
        put there when it was interrupted."""
        _empty_state(self.state)
        if not _finished(self.path):
            with os_errors("remove it", self.path):
                for name in (CONFIG_FILE, WEIGHTS_FILE, NOTE_FILE, CSV_NAME, PNG_NAME):
                    (self.path / name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Remove the state: the run has nothing left to do."""
        with os_errors("remove it", self.state):
            shutil.rmtree(self.state)


def _finished(path: Path) -> bool:
    """Whether the adapter in `path`, if there is one, is not what an interruption has left."""
    ended = None
    with contextlib.suppress(IrqError):  # no note, or a damaged one: none of an interruption
        ended = read_json_object(path / NOTE_FILE).get("training", {}).get("end")
    return ended != INTERRUPTED and (path / CONFIG_FILE).is_file()


def newest_checkpoint(path: Path) -> Path | None:
    """The newest whole checkpoint of the unfinished run in the adapter folder `path`."""
    found = {int(m[1]): p for p in (path / STATE).glob("*") if (m := _CHECKPOINT.fullmatch(p.name))}
    return found[max(found)] if found else None


def check_folder(out: Path, base: Path, *, resume: Resume, overwrite: bool) -> bool:
    """Whether `out` holds an unfinished run to be continued; touches nothing.

    It does once a state of training has been saved, also where the run is to replace an adapter.

    Raises `UsageError` when `out` may not be used: a file, the artifact or a folder in it, a
    finished adapter without `overwrite`, something else, or no run where one is required.
    """
    real = check_output(out, base, overwrite=True)
    if (real / STATE / RUN).is_file() and newest_checkpoint(real) is not None:
        return resume != Resume.NEVER
    if resume == Resume.REQUIRED:
        found = "a finished adapter" if (real / CONFIG_FILE).is_file() else "no unfinished run"
        raise UsageError(
            f"{out}: holds {found}, so there is nothing to resume; leave out --resume required"
        )
    names = {path.name for path in real.iterdir()} if real.is_dir() else set()
    if names <= {STATE}:
        return False
    if (real / CONFIG_FILE).is_file():
        if not overwrite:
            raise UsageError(f"{out}: not empty; choose another folder, or --overwrite the adapter")
        return False
    raise UsageError(f"{out}: not empty and no adapter; choose another folder")


@contextmanager
def run_folder(out: Path, base: Path, *, resume: Resume, overwrite: bool) -> Iterator[RunFolder]:
    """Yield `out`, made and locked, for a run. When the block raises and no checkpoint or adapter
    is there, all that was made is removed again, but for a teacher's logits; else the state stays
    to be resumed.

    Raises `UsageError` as `check_folder` and when another run is at work there.
    """
    resuming = check_folder(out, base, resume=resume, overwrite=overwrite)
    real = out.resolve()
    made = _make(real / STATE)
    lock = _lock(real, out)
    folder = RunFolder(real, resuming, _finished(real))
    try:
        _tidy(folder)
        yield folder
    except BaseException:
        if folder.checkpoint() is None:
            with contextlib.suppress(IrqError):
                _empty_state(folder.state)
            _remove_empty(made)
        raise
    finally:
        os.close(lock)


def _make(folder: Path) -> list[Path]:
    """Create `folder` and its parents; return those created, the innermost first."""
    missing = [at for at in (folder, *folder.parents) if not at.exists()]
    with os_errors("create it", folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _lock(real: Path, out: Path) -> int:
    with os_errors("lock it", real):
        fd = os.open(real / STATE / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UsageError(f"{out}: in use by a run that is not finished; wait for it") from None
    return fd


def _empty_state(state: Path) -> None:
    """Remove all of it but a teacher's logits, which may have taken hours."""
    if not (state / LOGITS).is_file():
        shutil.rmtree(state, ignore_errors=True)
        return
    with os_errors("empty it", state):
        for path in state.iterdir():
            if path.name != LOGITS:
                _discard(path)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _tidy(folder: RunFolder) -> None:
    """Remove what a killed run left half-written, and for a new run an older one's state, but for
    a teacher's logits."""
    with os_errors("empty it", folder.state):
        for path in folder.state.iterdir():
            kept = folder.resuming and (
                path.name in (RUN, BEFORE) or _CHECKPOINT.fullmatch(path.name)
            )
            if not kept and path.name not in (_LOCK, LOGITS):
                _discard(path)


def flush_folder(folder: Path) -> None:
    """Make every file in `folder` survive a power cut; `OSError` when that fails."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    fsync_folder(folder)
