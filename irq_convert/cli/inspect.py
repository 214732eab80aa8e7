"""The `inspect` command: what an artifact holds, from headers and manifest alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.calibration_show import calibration_rows, importance_rows, target_rows

if TYPE_CHECKING:
    from irq_convert.artifact.contents import Artifact
    from irq_convert.artifact.summary import Row


class By(StrEnum):
    """What a line of the table stands for."""

    LAYER = "layer"
    KIND = "kind"
    TENSOR = "tensor"


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw entropy and error.")
    ] = None,
    by: Annotated[By, typer.Option(help="One line for each layer, kind or tensor.")] = By.LAYER,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what an artifact holds: bits, entropy and error, layer by layer.

    Only headers and small files are read.

    Example: irq-convert inspect ./model-irq-nf4 --by kind --plot entropy.png
    """
    from irq_convert.jobs.inspect import inspect

    report = inspect(folder, by.value, plot=plot)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    _print_head(report.artifact)
    adapters = (report.artifact.manifest or {}).get("source", {}).get("adapters")
    _print_table(report.rows, report.total, by, merged=bool(adapters))
    if report.artifact.manifest is None:
        typer.echo("No irq_manifest.json: entropy and error are not known.")
    if plot is not None:
        typer.echo(f"Plot: {plot}")


def _print_head(artifact: Artifact) -> None:
    from irq_convert.artifact.manifest import stored_as
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts

    manifest = artifact.manifest or {}
    source = manifest.get("source", {})
    default = artifact.config.default
    share = artifact.quantized_weights / max(1, artifact.weights)
    overrides = len(artifact.config.overrides)
    lines = [
        ("artifact", str(artifact.folder)),
        ("source", str(source.get("model", "not known"))),
        ("source format", stored_as(source) if source else ""),
        ("revision", str(source.get("revision") or "")),
        ("format", f"{default.codebook}, blocks of {default.block_size}"),
        ("", f"{overrides} modules differ" if overrides else ""),
        ("statistics", f"scale {default.scale_dtype}, tau {default.tau_dtype}"),
        (
            "tensors",
            f"{short_bytes(artifact.checkpoint.nbytes)} in {len(artifact.checkpoint.shards)} "
            f"shard{'s' if len(artifact.checkpoint.shards) > 1 else ''}",
        ),
        ("quantized", f"{share:.1%} of {artifact.weights:,} weights"),
        ("bits per weight", f"{artifact.bits_per_weight:.4f}"),
        *calibration_rows(manifest.get("calibration")),
        *importance_rows(manifest.get("importance")),
        *target_rows(manifest.get("target")),
    ]
    facts((label, value) for label, value in lines if value)


def _print_table(rows: Sequence[Row], total: Row, by: By, *, merged: bool) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column(by.value, overflow="fold")
    headings = ("weights", *(() if by is By.TENSOR else ("quant.",)), "book", "bits/w")
    for heading in (*headings, "entropy", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    # Where bits differ they are what a person looks for.
    bars = by is not By.TENSOR and len({_bar(row) for row in rows} - {""}) > 1
    if bars:
        table.add_column(" stored", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, by), *([_bar(row)] if bars else []))
    table.add_section()
    table.add_row(*_cells(total, by))
    Console().print(table)
    if total.entropy is not None and by is not By.TENSOR:
        typer.echo(
            "entropy: bits a code, before -> after; error: squared, relative; rows are means"
        )
    if merged:
        typer.echo("error of what an adapter was merged into: to base plus adapter")
    if bars:
        typer.echo("stored: two marks a bit of a weight, quantized or not")


def _cells(row: Row, by: By) -> Iterator[str]:
    from rich.markup import escape

    yield escape(row.name)
    yield _short(row.weights)
    if by is not By.TENSOR:
        yield f"{row.share:.1%}"
    yield row.codebooks[0] if len(row.codebooks) == 1 else ("mixed" if row.codebooks else "")
    yield "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"
    known = row.entropy_plain is not None and row.entropy is not None
    yield f"{row.entropy_plain:.3f} -> {row.entropy:.3f}" if known else ""
    yield "" if row.relative_error is None else f"{row.relative_error:.5f}"


def _bar(row: Row) -> str:
    """Two marks a bit of all there is in a layer, as far as there is room; then a plus."""
    from irq_convert.artifact.summary import OTHER

    if row.name == OTHER:
        return ""
    marks = round(16 * row.bytes / max(1, row.weights))
    return " " + "#" * min(9, marks) + ("#" if marks == 10 else "+" if marks > 9 else "")


def _short(count: int) -> str:
    """`12345678` to `12.3 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
