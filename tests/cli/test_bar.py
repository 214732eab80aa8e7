"""The progress bar, looked at on a pseudo terminal of 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest

from .process import ENVIRONMENT, Commands
from .sources import make_source
from .terminal import until

COLUMNS = 80


def on_terminal(*args: object) -> tuple[int, str]:
    """Run the program with a terminal for all streams; return its exit code and what was drawn."""
    pid, fd = pty.fork()
    if not pid:
        os.environ.update(ENVIRONMENT | {"TERM": "xterm"})
        os.environ.pop("COLUMNS")
        os.execv(sys.executable, [sys.executable, "-m", "irq_convert", *map(str, args)])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    drawn = b""
    while True:
        try:
            piece = os.read(fd, 1 << 16)
        except OSError:  # the terminal is gone: Linux says EIO
            break
        if not piece:
            break
        drawn += piece
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), drawn.decode()


def lines_of(drawn: str) -> list[str]:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.slow
def test_what_is_drawn_while_quantizing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", rows=30_000)
    code, drawn = on_terminal("quantize", source, tmp_path / "out", "--refine", 30)
    assert code == 0, drawn
    lines = lines_of(drawn)
    counted = [line for line in lines if line.startswith("quantizing") and "tensors" in line]
    assert len(set(counted)) >= 2
    speed, left = r"[\d.]+ ([kMG]B|bytes)/s", r"(\d+:\d\d:\d\d|-:--:--)"
    shape = rf"quantizing [━╸╺ ]{{16}} \d+/7 tensors +{speed} \d+\.\d\d GB +{left}"
    for line in counted:
        assert re.fullmatch(shape, line), line
        assert len(line) <= COLUMNS
    assert any(line.startswith("planning") for line in lines)
    assert any("kernels" in line for line in lines)
    # Frames are one line each: the cursor goes up once, to wipe the last of them.
    assert drawn.count("\x1b[1A") == 1
    assert drawn.rindex("\x1b[1A") < drawn.index("artifact")
    assert lines[-1].startswith("time")


def test_a_failure_wipes_the_bar(irq: Commands, tmp_path: Path) -> None:
    args = ("quantize", make_source(tmp_path / "source"), tmp_path / "out", "--keep", "nope")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, COLUMNS))
    running = irq.start(*args, terminal=os.ttyname(theirs), TERM="xterm")
    drawn = until(ours, "\n", after="irq-convert: ")
    assert running.wait().code == 2
    os.close(ours)
    os.close(theirs)
    assert "planning" in drawn
    assert lines_of(drawn)[-1].startswith("irq-convert: --keep 'nope' matches no tensor")
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")  # the cursor is shown again


def test_nothing_is_drawn_where_there_is_no_terminal(irq: Commands, tmp_path: Path) -> None:
    result = irq("quantize", make_source(tmp_path / "source"), tmp_path / "out")
    assert result.code == 0
    assert result.err == ""
    assert "\x1b" not in result.out
    assert "quantizing" not in result.out


def test_it_begins_at_what_is_done() -> None:
    """And what was done before counts neither for the speed nor for the time left."""
    from irq_convert.cli.bar import ProgressBar

    with ProgressBar() as bar:
        task = bar._bar.tasks[0]
        bar.phase("quantizing", 8, 1000)
        bar.resumed(3, 400)
        assert (task.completed, task.total, task.fields["things"]) == (400, 1000, "3/8 tensors")
        assert task.speed is None
        bar.advance(100, True)
        bar.advance(200, 3)  # what other processes have done
        assert (task.completed, task.fields["things"]) == (700, "7/8 tensors")


def test_the_widest_line_fits() -> None:
    """Ten thousand tensors, gigabytes a second, hundreds of gigabytes, hours to go."""
    import io

    from rich.console import Console

    from irq_convert.cli.bar import ProgressBar

    bar = ProgressBar()
    console = Console(file=io.StringIO(), width=COLUMNS, force_terminal=True)
    task = bar._bar.tasks[0]
    bar._bar.update(
        task.id,
        description="quantizing",
        total=10**13,
        completed=10**9,
        things="12345/23456 tensors",
        memory="123.45 GB",
    )
    console.print(bar._bar.make_tasks_table(bar._bar.tasks))
    assert isinstance(console.file, io.StringIO)
    assert len(lines_of(console.file.getvalue())) == 1
