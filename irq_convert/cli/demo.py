"""The `demo` command: the whole way on a small model that ships with the package."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.console import quiet_libraries

if TYPE_CHECKING:
    from irq_convert.jobs.demo.demo import DemoRow
    from irq_convert.jobs.demo.journey import DemoStep


def demo_command(
    out: Annotated[Path | None, typer.Option(help="Keep the artifacts in this new folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Quantize a small trained model, finetune it each way, merge it each way; measure all.

    Example: irq-convert demo --out demo-artifacts
    """
    from rich.console import Console

    quiet_libraries()

    from irq_convert.checkpoint.disk import output_folder
    from irq_convert.jobs.demo.demo import run_demo

    with Console(stderr=True).status("loading") as status, tempfile.TemporaryDirectory() as scratch:
        if out is None:
            rows = list(run_demo(Path(scratch), status.update))
        else:
            with output_folder(out) as staging:
                rows = list(run_demo(staging, status.update))
    from irq_convert.jobs.demo.demo import DemoRow

    quantized = [row for row in rows if isinstance(row, DemoRow)]
    steps = [row for row in rows if not isinstance(row, DemoRow)]
    if as_json:
        found = {
            "quantized": [row.to_dict() for row in quantized],
            "steps": [step.to_dict() for step in steps],
        }
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_quantized(quantized)
        _print_steps(steps)


def _print_quantized(rows: list[DemoRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="quantize", title_justify="left")
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
        "a code. Perplexity and KL(source || quantized) on held-out text, ± standard error.\n"
    )


def _print_steps(steps: list[DemoStep]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="finetune and merge", title_justify="left")
    table.add_column("")
    for title in ("seconds", "MB", "perplexity"):
        table.add_column(title, justify="right")
    for step in steps:
        seconds = "" if step.seconds is None else f"{step.seconds:.1f}"
        perplexity = _with_error(step.perplexity, step.perplexity_se)
        table.add_row(step.name, seconds, f"{step.megabytes:.2f}", perplexity)
    console = Console()
    console.print(table)
    console.print(
        "seconds: of the step. MB: the folder it wrote. perplexity: of the artifact with the "
        "adapter on it, or of what was merged. A block-pooled adapter merges into the artifact."
    )


def _with_error(value: float, error: float | None) -> str:
    digits = 2 if value >= 1 else 4
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ±{error:.{digits}f}"
