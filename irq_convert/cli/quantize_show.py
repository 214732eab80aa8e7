"""What `quantize` shows: a report, or what a dry run has found out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from irq_convert.cli.calibration_show import (
    calibration_rows,
    frontier_lines,
    importance_rows,
    target_rows,
)

if TYPE_CHECKING:
    from irq_convert.jobs.quantize.estimate import QuantizeEstimate
    from irq_convert.jobs.quantize.options import QuantizeOptions
    from irq_convert.jobs.quantize.report import QuantizeReport


def warn_of_little(found: QuantizeReport | QuantizeEstimate) -> None:
    """A line where little of a model is quantized, and why."""
    from irq_convert.jobs.quantize.report import little_quantized

    line = little_quantized(found.weights, found.quantized_weights, found.kept)
    if line is not None:
        typer.echo(f"irq-convert: {line}", err=True)


def print_estimate(found: QuantizeEstimate) -> None:
    """What a dry run has found out."""
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts, resume_rows, seconds

    free = "free" if found.disk_needed <= found.disk_free else "free: not enough"
    facts(
        [
            ("source", f"{found.model}, {short_bytes(found.bytes_in)}, {found.source_format}"),
            ("would write", f"{found.out}, {found.bytes_out:,} bytes + manifest"),
            ("shards", str(found.shards)),
            ("quantized", f"{found.share:.1%} of {found.weights:,} weights"),
            ("", f"({found.quantized_tensors} of {found.tensors} tensors, by {found.decided_by})"),
            ("bits per weight", f"{found.bits_per_weight:.4f}"),
            *importance_rows(found.importance),
            ("time", f"about {seconds(found.seconds)} ({found.rate / 1e6:.0f} M weights/s here)"),
            *resume_rows(found.finished, found.shards),
            ("disk needed", f"{found.disk_needed:,} bytes ({short_bytes(found.disk_free)} {free})"),
            *_fetch_rows(found),
            *_calibration_rows(found),
        ]
    )
    if found.frontier:
        typer.echo("\nwhat other sizes would give, by what was measured:")
        for line in frontier_lines(found.frontier):
            typer.echo(line)


def _calibration_rows(found: QuantizeEstimate) -> list[tuple[str, str]]:
    from irq_convert.checkpoint.system import short_bytes

    cost = found.calibration
    if cost is None:
        return []
    return [
        ("calibrating", f"{cost.tokens:,} tokens in {cost.windows} windows, {cost.layers} layers"),
        ("", f"about {short_bytes(cost.memory)} of memory, {short_bytes(cost.disk)} of the disk"),
    ]


def _fetch_rows(found: QuantizeEstimate) -> list[tuple[str, str]]:
    from irq_convert.checkpoint.system import short_bytes

    if not found.fetched:
        return []
    return [("download takes", f"{short_bytes(found.fetched)} in {found.fetched_to}")]


def print_report(report: QuantizeReport, options: QuantizeOptions) -> None:
    """What a conversion has made."""
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import facts, seconds

    before, after = report.entropy_plain, report.entropy
    codebook, most = options.spec.codebook, f", of {options.spec.bits}"
    if report.target is not None:
        uniform = report.target["kept"] == "uniform"
        most, codebook = "", "a mix of codebooks"
        if uniform:
            codebook = str(report.target["uniform"]["choice"])
    rows = [
        ("artifact", report.out),
        ("source format", report.source_format),
        ("size", f"{short_bytes(report.bytes_in)} -> {short_bytes(report.bytes_out)}"),
        ("quantized", f"{report.share:.1%} of {report.weights:,} weights, {codebook}"),
        ("", f"(decided by {report.decided_by})"),
        ("bits per weight", f"{report.bits_per_weight:.4f}"),
        *target_rows(report.target),
        *importance_rows(report.importance),
        ("entropy", f"{before:.4f} -> {after:.4f} bits a code{most}"),
        ("relative error", f"{report.relative_error:.5f} (squared, of the weights' energy)"),
        *calibration_rows(report.calibration),
        ("worst tensors", ""),
        *((f"  {w.relative_error:.5f}", f"{w.name} ({w.codebook})") for w in report.worst),
        ("time", f"{seconds(report.seconds)}"),
    ]
    facts(rows)
