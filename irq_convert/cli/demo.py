"""The `demo` command: the whole way on a small model that ships with the package."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from irq_convert.demo.run import DemoRow


def demo_command(
    out: Annotated[Path | None, typer.Option(help="Keep the artifacts in this new folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Quantize a small trained model at 4, 3 and 2 bits and measure each result.

    Example: irq-convert demo --out demo-artifacts
    """
    from rich.console import Console
    from transformers.utils import logging

    from irq_convert.checkpoint.disk import output_folder
    from irq_convert.demo.run import run_demo

    logging.disable_progress_bar()
    with Console(stderr=True).status("loading") as status, tempfile.TemporaryDirectory() as scratch:
        if out is None:
            rows = list(run_demo(Path(scratch), status.update))
        else:
            with output_folder(out) as staging:
                rows = list(run_demo(staging, status.update))
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in rows], indent=2))
    else:
        _print_table(rows)


def _print_table(rows: list[DemoRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("")
    for title in ("MB", "bits/w", "entropy", "perplexity", "KL, nats"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.megabytes:.2f}",
            f"{row.bits_per_weight:.2f}",
            "" if row.entropy is None else f"{row.entropy:.3f}",
            _with_error(row.perplexity, row.perplexity_se),
            "" if row.kl is None else _with_error(row.kl, row.kl_se),
        )
    console = Console()
    console.print(table)
    console.print(
        "MB: the whole folder. bits/w: of quantized weights, statistics included. entropy: bits "
        "a code. Perplexity and KL(source || quantized) on held-out text, +- standard error."
    )


def _with_error(value: float, error: float | None) -> str:
    digits = 2 if value >= 1 else 4
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ±{error:.{digits}f}"
