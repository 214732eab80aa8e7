"""The `export` command: parse, call, show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.artifact.export_targets import TARGETS
from irq_convert.cli.shared import (
    AsJson,
    DryRun,
    MaxShardSize,
    Overwrite,
    Threads,
    TrustRemoteCode,
    shard_bytes,
)

if TYPE_CHECKING:
    from irq_convert.jobs.export.options import ExportOptions
    from irq_convert.jobs.export.report import ExportEstimate, ExportReport, Storage

WORST = 3
WIDTH = 80 - 17
"""Columns beside the labels."""
NOISE = 1e-12
"""Relative errors below are the rounding of float32 and tell nothing about a tensor."""


def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the artifact.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    to: Annotated[str, typer.Option(metavar="TARGET", help=f"{', '.join(TARGETS)}.")],
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Of dense tensors and scales: bfloat16, float16, float32 (gguf: also q8_0); "
            "auto is what the model has.",
        ),
    ] = "auto",
    fallback: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="gguf: type of what it cannot hold: auto, f16, bf16, f32 or q8_0.",
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="compressed-tensors: fit integer zero points, with a loss."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    threads: Threads = None,
    max_shard_size: MaxShardSize = 5.0,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Export an artifact to a format that other programs run, and measure the difference.

    dense: a checkpoint in 16 or 32 bits.  mlx: the folder that mlx-lm loads.
    gguf: a file for llama.cpp.  compressed-tensors: for vLLM and transformers.
    What a target cannot hold is refused, with the way out.

    Example: irq-convert export ./model-irq-int4 ./model-mlx --to mlx
    """
    from irq_convert.jobs.export.options import ExportOptions

    options = ExportOptions(
        to=to,
        dtype=dtype,
        fallback=fallback,
        refit=refit,
        threads=threads,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        max_shard_bytes=shard_bytes(max_shard_size),
    )
    if dry_run:
        _dry_run(folder, out, options, as_json)
        return
    _export(folder, out, options, as_json)


def _dry_run(folder: Path, out: Path, options: ExportOptions, as_json: bool) -> None:
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.jobs.export.export import estimate_export

    with ProgressBar() as bar:
        found = estimate_export(folder, out, options, progress=bar)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print_estimate(found)


def _export(folder: Path, out: Path, options: ExportOptions, as_json: bool) -> None:
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.jobs.export.export import export

    with ProgressBar() as bar:
        report = export(folder, out, options, progress=bar)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print_report(report)


def _wrapped(label: str, text: str) -> list[tuple[str, str]]:
    """Rows of a text that holds no paths, which are not to be broken."""
    lines = wrap(text, WIDTH, break_long_words=False) or [""]
    return [(label if at == 0 else "", line) for at, line in enumerate(lines)]


def _storage_rows(storages: Iterable[Storage]) -> list[tuple[str, str]]:
    """How tensors are stored, with the reason below where there is one."""
    rows = []
    for at, found in enumerate(storages):
        loss = "" if found.exact else ", not exact"
        many = f"{found.tensors} tensors" if found.tensors > 1 else found.example
        rows += _wrapped("" if at else "quantized", f"{many}: {found.stored}{loss}")
        if found.why:
            rows += _wrapped("", f"({found.why})")
    return rows


def _note_rows(notes: Iterable[str]) -> list[tuple[str, str]]:
    return [row for note in notes for row in _wrapped("note", note)]


def _print_estimate(found: ExportEstimate) -> None:
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts

    free = "free" if found.disk_needed <= found.disk_free else "free: not enough"
    facts(
        [
            ("artifact", f"{found.artifact} ({found.artifact_sha256[:12]})"),
            ("would write", f"{found.out} ({found.to}), {found.bytes_out:,} bytes + a note"),
            *_wrapped("target", found.summary),
            ("files", str(len(found.files))),
            *_storage_rows(found.storages),
            ("size", f"{short_bytes(found.bytes_in)} -> {short_bytes(found.bytes_out)}"),
            ("disk needed", f"{found.disk_needed:,} bytes ({short_bytes(found.disk_free)} {free})"),
            *_note_rows(found.notes),
        ]
    )


def _print_report(report: ExportReport) -> None:
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts, seconds

    rows = [
        ("result", f"{report.out} ({report.to})"),
        ("artifact", f"{report.artifact} ({report.artifact_sha256[:12]})"),
        ("size", f"{short_bytes(report.bytes_in)} -> {short_bytes(report.bytes_out)}"),
        *_storage_rows(report.storages),
        ("difference", f"largest {report.largest:.2e}, {report.largest_relative:.2e} of the"),
        ("", "tensor's largest weight"),
        ("relative error", f"{report.relative_error:.2e} (squared, against the artifact)"),
    ]
    if report.changed_codes:
        share = report.changed_codes / report.weights
        rows.append(("changed codes", f"{report.changed_codes:,} ({share:.2%})"))
    worst = report.worst(WORST) if report.relative_error > NOISE else []
    if worst:
        rows.append(("worst tensors", ""))
        rows += [(f"  {found.relative_error:.2e}", found.name) for found in worst]
    rows += _note_rows(report.notes)
    facts([*rows, ("time", seconds(report.seconds))])
