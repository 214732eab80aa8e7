"""Asking a run to stop: Ctrl-C and its relatives end it after the step at hand, and it is saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Raised out of a measurement that was asked to stop; never reaches a user."""


class StopRequest:
    """`number` of the signal that came, 0 while none has."""

    def __init__(self) -> None:
        self.number = 0

    def tick(self, done: int, total: int) -> None:
        """Raise `Stopped` once a signal has come."""
        if self.number:
            raise Stopped


@contextmanager
def stop_on_signals(alone: bool) -> Iterator[StopRequest]:
    """Within the block a first signal is noted; a second Ctrl-C has its usual effect, at once.

    Not so unless `alone`: torchrun passes on a Ctrl-C that its processes have had already.
    Signals that are ignored, as by nohup, stay ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN}

    def note(number: int, frame: FrameType | None) -> None:
        if request.number and alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.number = request.number or number

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
