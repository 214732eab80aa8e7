"""The `verify` command: is an artifact whole, legal and true to its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.shared import AsJson
from irq_convert.errors import UsageError

if TYPE_CHECKING:
    from irq_convert.artifact.verify import VerifyReport

MOST_LINES = 50


def verify_command(
    folder: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Its source, folder or Hub id, to compare with."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the source on the Hub.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an artifact: structure, checksums, legal values; with --against, its source too.

    Prints one line for each thing that is wrong and exits with 1, or a summary and exits with 0.

    Example: irq-convert verify ./model-irq-nf4 --against ./model
    """
    if revision is not None and against is None:
        raise UsageError("--revision is that of the source: give the source with --against")
    from irq_convert.artifact.verify import verify_artifact

    source = None
    if against is not None:
        from irq_convert.checkpoint.locate import open_source

        source = open_source(against, revision)
    with _progress_bar() as progress:
        report = verify_artifact(folder, against=source, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report, against)
    if not report.ok:
        raise typer.Exit(1)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr, where that is a terminal; yields `progress`."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeLeft())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("verifying", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield progress


def _print_report(report: VerifyReport, against: str | None) -> None:
    from irq_convert.cli.show import facts, gigabytes

    for line in report.failures[:MOST_LINES]:
        typer.echo(" ".join(line.split()))
    if len(report.failures) > MOST_LINES:
        typer.echo(f"... and {len(report.failures) - MOST_LINES} more (--json lists all)")
    if not report.ok:
        return
    rows = [
        ("artifact", report.folder),
        ("files", f"{report.files}, {gigabytes(report.bytes)}: as they were written"),
        ("tensors", f"{report.quantized} quantized and {report.copied} copied, all parts legal"),
    ]
    if against is not None:
        rows += [
            ("source", f"{against}: every tensor accounted for, copies are equal"),
            ("relative error", f"{report.relative_error:.5f}, recomputed, as in the manifest"),
            ("entropy", f"{report.entropy:.4f} bits a code, recomputed, as in the manifest"),
        ]
    else:
        rows.append(("source", "not compared (--against)"))
    facts([*rows, ("result", "whole")])
