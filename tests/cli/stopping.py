"""Stopping a command at a moment, when it may come to its end before the signal does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from .process import Result, Running

ATTEMPTS = 20


def ended(running: Running) -> bool:
    """Whether the process is gone."""
    try:
        os.kill(running.pid, 0)
    except ProcessLookupError:
        return True
    return False


def await_moment(running: Running, ready: Callable[[], object], seconds: float = 60) -> bool:
    """Wait for `ready()`; False when the command came to its end before."""
    deadline = time.monotonic() + seconds
    while not ready():
        if ended(running):
            return bool(ready())
        assert time.monotonic() < deadline, "the moment does not come"
        time.sleep(0.001)
    return True


def stop_at(
    start: Callable[[], Running],
    ready: Callable[[], object],
    clean: Callable[[], object],
    number: int = signal.SIGKILL,
    whole: Callable[[], bool] = lambda: False,
) -> Result:
    """Start a command and send it `number` when `ready()`; the result of the stopped command.

    A command that was faster has code 0, or was stopped when its output was `whole`: `clean` then
    removes that, and it is started again. Where it always is faster, the test is skipped.
    """
    for _ in range(ATTEMPTS):
        running = start()
        if await_moment(running, ready):
            running.kill(number)
        result = running.wait()
        if result.code and not whole():
            return result
        clean()
    pytest.skip(f"this machine is faster than a signal, {ATTEMPTS} times")
