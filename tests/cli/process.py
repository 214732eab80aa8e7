"""The program as a user runs it, in processes of its own.

A fresh interpreter takes seconds to import what `quantize` needs. `Commands` has one that has
imported it all and forks for each command, so a hundred bad inputs take little longer than one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.folders import listing
from tests.ranks import agent_store

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "80",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Result:
    """What a finished command left."""

    code: int
    out: str
    err: str


class Running:
    """A command that has been started."""

    def __init__(self, pid: int, server: subprocess.Popen[str], out: Path, err: Path) -> None:
        self.pid = pid
        self._server, self._out, self._err = server, out, err
        self.finished = False

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(self.pid, number)

    def wait(self) -> Result:
        assert self._server.stdout is not None
        code = int(self._server.stdout.readline())
        self.finished = True
        return Result(code, self._out.read_text(), self._err.read_text())


class Commands:
    """Runs `irq-convert` in forks of an interpreter that has imported everything."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **ENVIRONMENT,
                "NUMBA_THREADING_LAYER": "workqueue",  # the only threads that survive a fork
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # as the program sets it before any import
            },
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        self._running: Running | None = None

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(60)

    def start(
        self,
        *args: object,
        cwd: Path | None = None,
        nobody: bool = False,
        ranks: int = 0,
        terminal: str | None = None,
        unread: bool = False,
        **env: str,
    ) -> Running:
        """Start a command; one that a failed test has left running is killed before.

        `terminal` is the device that it is to be run at; `unread`: its output is a pipe that nobody
        reads.
        """
        if self._running and not self._running.finished:
            self._running.kill()
            self._running.wait()
        out, err = self._scratch / "out", self._scratch / "err"
        for path in (out, err):
            path.write_text("")
            path.chmod(0o666)
        request = {
            "args": [str(arg) for arg in args],
            "cwd": str(cwd or self._scratch),
            "env": env,
            "nobody": nobody,
            "ranks": ranks,
            "terminal": terminal,
            "unread": unread,
            "stdout": str(out),
            "stderr": str(err),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        self._running = Running(pid, self._server, out, err)
        return self._running

    def __call__(
        self,
        *args: object,
        cwd: Path | None = None,
        nobody: bool = False,
        ranks: int = 0,
        **env: str,
    ) -> Result:
        """Run a command to its end, at most five minutes."""
        running = self.start(*args, cwd=cwd, nobody=nobody, ranks=ranks, **env)
        timer = threading.Timer(300, running.kill)
        timer.start()
        try:
            return running.wait()
        finally:
            timer.cancel()

    def together(self, ranks: int, *args: object, **env: str) -> Result:
        """Run a command in so many processes, as torchrun would on one host."""
        _store, told = agent_store(ranks)
        return self(*args, ranks=ranks, **told, **env)


def fresh(*args: object, cwd: Path | None = None, **env: str) -> Result:
    """Run `python -m irq_convert` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "irq_convert", *map(str, args)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Check that the block changes nothing under `folder`."""
    before = listing(folder)
    yield
    assert listing(folder) == before


def assert_fails(result: Result, code: int, *words: str) -> None:
    """Check the exit code and that stderr is one line that has every one of `words`."""
    assert result.code == code, result
    assert result.err.startswith("irq-convert: ")
    assert result.err.count("\n") == 1, result.err
    assert result.err.endswith("\n")
    assert "Traceback" not in result.err
    assert result.out == ""
    for word in words:
        assert word in result.err, f"{word!r} not in {result.err!r}"
