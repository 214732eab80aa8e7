"""Text as it comes: on its own as it is, of two models in two columns; and how fast it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from irq_convert.jobs.generate.generate import in_turns
from irq_convert.jobs.generate.report import Ended, Generated, GenerateReport, same_start

if TYPE_CHECKING:
    from irq_convert.jobs.generate.stream import TextStream

WIDTH = 80
"""Of the two columns where no terminal says another."""
_WHY = {
    Ended.END: "it ended the text",
    Ended.LENGTH: "--max-tokens reached",
    Ended.POSITIONS: "all its positions used",
    Ended.STOPPED: "stopped",
}


def show(streams: Sequence[TextStream], prompt: str = "", silent: bool = False) -> bool:
    """Show what the streams give as they give it; whether a person let them come to their end."""
    try:
        with closing(in_turns(streams)) as pieces:
            if silent:
                for _ in pieces:
                    pass
            elif len(streams) == 1:
                _one(pieces, prompt)
            else:
                _two(pieces, streams, prompt)
    except KeyboardInterrupt:
        return False
    return True


def _one(pieces: Iterator[tuple[int, str]], prompt: str) -> None:
    if sys.stdout.isatty():
        typer.secho(_safe(prompt), dim=True, nl=False)
    try:
        for _, piece in pieces:
            typer.echo(_safe(piece), nl=False)
            sys.stdout.flush()
    finally:
        typer.echo()


def _two(pieces: Iterator[tuple[int, str]], streams: Sequence[TextStream], prompt: str) -> None:
    """Two columns: drawn again with each piece on a terminal, else once in the end."""
    console = Console()
    columns = _Columns([stream.name for stream in streams], prompt)
    if not console.is_terminal:
        console = Console(width=WIDTH)
    live: Any = (
        Live(columns, console=console, refresh_per_second=10, vertical_overflow="visible")
        if console.is_terminal
        else nullcontext()
    )
    try:
        with live:
            try:
                for number, piece in pieces:
                    columns.texts[number] += _safe(piece)
            finally:
                columns.whole = True
    finally:
        if not console.is_terminal:
            console.print(columns)


class _Columns:
    """Two texts side by side; until they are `whole`, the last lines that the terminal can hold."""

    def __init__(self, names: Sequence[str], prompt: str) -> None:
        self.names, self.prompt = names, _safe(prompt)
        self.texts = ["", ""]
        self.whole = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
        for name in _told_apart(self.names):
            table.add_column(Text(name), ratio=1, overflow="fold")
        same = same_start(*self.texts)
        table.add_row(*(self._text(text, same) for text in self.texts))
        lines = console.render_lines(table, options.update(height=None), pad=False)
        if not self.whole and len(lines) > options.max_height:
            lines = lines[-options.max_height + 1 :]
        for line in lines:
            yield from line
            yield Segment.line()

    def _text(self, text: str, same: int) -> Text:
        found = Text(self.prompt, style="dim")
        found.append(text[:same], style="not dim")
        return found.append(text[same:], style="not dim yellow")


def figures(report: GenerateReport) -> None:
    """How many tokens and how fast, on standard error: the text alone is what is piped."""
    if report.reference is None:
        typer.echo(_speed(report.generated), err=True)
        return
    both = (report.generated, report.reference)
    names = _told_apart([each.model for each in both])
    width = max(map(len, names))
    for name, each in zip(names, both, strict=True):
        typer.echo(f"{name:<{width}}  {_speed(each)}", err=True)
    texts = [each.text for each in both]
    same = report.same_characters
    alike = "the same text" if texts[0] == texts[1] else f"the first {same:,} characters alike"
    typer.echo(alike, err=True)


def _speed(found: Generated) -> str:
    speed = found.tokens_per_second
    rate = "" if speed is None else f", {speed:.1f} tokens a second"
    first = "" if found.first_seconds is None else f", the first after {found.first_seconds:.2f} s"
    count = f"{found.tokens:,} token{'' if found.tokens == 1 else 's'}"
    return f"{count}{rate}{first}; {_WHY[found.ended]}"


def _told_apart(names: Sequence[str]) -> list[str]:
    """Last parts of paths where these differ; numbers where whole names do not."""
    short = [PurePath(name).name or name for name in names]
    for found in (short, list(names)):
        if len({*found}) == len(found):
            return found
    return [f"{name} ({number})" for number, name in enumerate(short, 1)]


def _safe(text: str) -> str:
    """Without escapes, which a model may write and a terminal would obey."""
    return text.replace("\x1b", "\u241b")
