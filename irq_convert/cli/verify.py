"""The `verify` command: is an artifact whole, legal and true to its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.shared import AsJson

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
        str | None,
        typer.Option(
            help="Branch, tag or commit of the source on the Hub.  "
            "\\[default: the commit that the manifest names]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check an artifact: structure, checksums, legal values; with --against, its source too.

    Prints one line for each thing that is wrong and exits with 1, or a summary and exits with 0.

    Example: irq-convert verify ./model-irq-nf4 --against ./model
    """
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.jobs.verify import verify

    with ProgressBar("files") as bar:
        report = verify(folder, against, revision=revision, progress=bar)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report, against)
    if not report.ok:
        raise typer.Exit(1)


def _print_report(report: VerifyReport, against: str | None) -> None:
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts

    for line in report.failures[:MOST_LINES]:
        typer.echo(" ".join(line.split()))
    if len(report.failures) > MOST_LINES:
        typer.echo(f"... and {len(report.failures) - MOST_LINES} more (--json lists all)")
    if not report.ok:
        return
    rows = [
        ("artifact", report.folder),
        ("files", f"{report.files}, {short_bytes(report.bytes)}: as they were written"),
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
