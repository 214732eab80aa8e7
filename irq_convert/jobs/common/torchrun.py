"""The processes of one run under torchrun: they agree, tell each other how far they are, and end.

They talk through the key-value store that torchrun sets up. Collectives (gloo) would not do: work
takes hours and a collective blocks until all are there, so that its time limit is either too short
for the work or too long for a death. The store can be asked without waiting; every process counts
up a number in it every two seconds, and one that has stopped counting is known to be gone. Files
on a shared file system would be seen late, since network file systems cache what is not there.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
BEAT = 2.0
"""Seconds between signs of life."""
PATIENCE = 60.0
"""Seconds without one after which a process counts as gone."""
FIRST_PATIENCE = 600.0
"""The same before the first: a host may be slow to start."""
ANSWER = 15.0
"""Seconds that a process which failed waits for the first one to say it."""
_LOOK, _PAUSE = 0.5, 0.05
_STOPPED = "was stopped"


class FailedElsewhere(IrqError):
    """The run has failed, and another process says why."""


class RunProcesses:
    """One run's processes, seen from one of them; of a process that is alone all calls are empty.

    A context manager: a failure inside is told to the others, so that they end too. Of the
    processes of a run only one raises what went wrong; in the others it is `FailedElsewhere`.
    """

    _number = 0

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks.from_environment()
        self._store: Store | None = None
        self._ended = threading.Event()
        self._done = (0, 0)
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._failed = False
        self._heart = threading.Thread(target=self._beat, name="irq-beat", daemon=True)

    def __enter__(self) -> RunProcesses:
        if not self.ranks.alone:
            RunProcesses._number += 1
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._prefix = f"irq-convert/{attempt}/{RunProcesses._number}/"
            self._store = _connect(self.ranks)
            self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and self._store is not None:
                self.fail(error)
                if not self.ranks.first and isinstance(error, IrqError):
                    raise self._answer(error) from error
        finally:
            self._ended.set()
            if self._heart.is_alive():
                self._heart.join(ANSWER)  # not at the end of the interpreter, where it would crash

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process is about to end with `error`."""
        if self._store is None or self._failed:
            return
        self._failed = True
        said = [getattr(error, "exit_code", 1), str(error) if str(error) else type(error).__name__]
        if isinstance(error, KeyboardInterrupt | SystemExit):
            said = [1, _STOPPED]
        try:
            self.put(f"failed/{self.ranks.rank}", json.dumps(said).encode())
            self.put("failed", b"")
        except IrqError:
            pass  # nobody is there to be told

    def _answer(self, error: IrqError) -> IrqError:
        """`FailedElsewhere` where the first process says it, else the error for this one to say."""
        if isinstance(error, FailedElsewhere):
            return error
        end = time.monotonic() + ANSWER
        try:
            while time.monotonic() < end:
                if self.has(f"heard/{self.ranks.rank}") or self.has("failed/0"):
                    return _told(error)
                time.sleep(_PAUSE)
        except IrqError:
            pass
        return type(error)(f"process {self.ranks.rank} of {self.ranks.count}: {error}")

    def put(self, key: str, value: bytes) -> None:
        """Publish `value`; nothing happens alone."""
        store = self._store
        if store is not None:
            _ask(lambda: store.set(self._prefix + key, value))  # type: ignore[arg-type]

    def has(self, key: str) -> bool:
        """Whether `key` has been published."""
        store = self._store
        return store is not None and _ask(lambda: store.check([self._prefix + key]))

    def get(self, key: str) -> bytes:
        """What has been published under `key`."""
        store = self._store
        assert store is not None
        return bytes(_ask(lambda: store.get(self._prefix + key)))

    def take(self, key: str) -> bytes:
        """Wait until another process has published `key`; raises when the run fails meanwhile."""
        self.wait(lambda: self.has(key))
        return self.get(key)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`; raises as `watch`."""
        while not ready():
            self.watch()
            time.sleep(_PAUSE)

    def watch(self) -> None:
        """Raise when the run has failed elsewhere; cheap enough to be called for every tile.

        In the first process an `IrqError` that says where and why, in the others `FailedElsewhere`.
        """
        now = time.monotonic()
        if self._store is None or now - self._looked < _LOOK:
            return
        self._looked = now
        if not self.ranks.first:
            if self.has("failed/0"):
                raise FailedElsewhere("the first process has failed")
            self._listen(0, now)
            return
        others = range(1, self.ranks.count)
        if self.has("failed"):
            for rank in others:
                if self.has(f"failed/{rank}"):
                    raise self._failure(rank)
        for rank in others:
            if not self.has(f"done/{rank}"):
                self._listen(rank, now)

    def _failure(self, rank: int) -> IrqError:
        code, message = json.loads(self.get(f"failed/{rank}"))
        self.put(f"heard/{rank}", b"")
        kind = UsageError if code == UsageError.exit_code else IrqError
        colon = "" if message == _STOPPED else ":"
        return kind(f"process {rank} of {self.ranks.count}{colon} {message}")

    def _listen(self, rank: int, now: float) -> None:
        """Raise when `rank` has given no sign of life for too long."""
        key = f"beat/{rank}"
        beat = self.get(key) if self.has(key) else b""
        known, since = self._seen.setdefault(rank, (beat, now))
        if beat != known:
            self._seen[rank] = (beat, now)
        elif now - since > (PATIENCE if beat else FIRST_PATIENCE):
            raise IrqError(
                f"process {rank} of {self.ranks.count} has not been heard of for "
                f"{now - since:.0f} s: it or its host has died"
            )

    def count(self, nbytes: int, tensors: int) -> None:
        """Add to what this process has done, which the first one shows."""
        self._done = (self._done[0] + nbytes, self._done[1] + tensors)

    def others(self) -> tuple[int, int]:
        """Bytes and tensors that the other processes had done when they were last looked at."""
        beats = [json.loads(beat) for beat, _ in self._seen.values() if beat]
        return sum(beat[1] for beat in beats), sum(beat[2] for beat in beats)

    def _beat(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            try:
                beat = json.dumps([number, *self._done]).encode()
                self.put(f"beat/{self.ranks.rank}", beat)
            except IrqError:
                return  # the main thread will see it for itself
            self._ended.wait(BEAT)


def _told(error: IrqError) -> FailedElsewhere:
    told = FailedElsewhere(str(error))
    told.exit_code = error.exit_code
    return told


def _connect(ranks: Ranks) -> Store:
    from torch.distributed import rendezvous

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UsageError(
                f"WORLD_SIZE is {ranks.count} but {name} is not set: start it by torchrun"
            )
    stores = rendezvous("env://", ranks.rank, ranks.count, timeout=timedelta(seconds=120))
    found: Store = _ask(lambda: next(iter(stores)))[0]
    return found


def _ask(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as error:  # torch's network and store errors are
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise IrqError(
            f"the connection between the processes of this run is lost ({reason[:100]}): another "
            "has ended, or the network has failed"
        ) from error
