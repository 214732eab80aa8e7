"""The `measure` command: parse, call, show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.shared import (
    AsJson,
    DryRun,
    LlamaVersion,
    Revision,
    Stream,
    Threads,
    TrustRemoteCode,
)
from irq_convert.jobs.calibration.options import TOKENS

if TYPE_CHECKING:
    from irq_convert.jobs.measure.report import MeasureEstimate, MeasureReport


def measure_command(
    model: Annotated[str, typer.Argument(help="Local folder or Hub id of the source model.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="File to write.  \\[default: NAME-importance.safetensors here]"),
    ] = None,
    *,
    text: Annotated[
        str,
        typer.Option(help="A file (text, JSONL) or a Hub dataset to read.", show_default=False),
    ],
    tokens: Annotated[int, typer.Option(help="Most tokens to take.")] = TOKENS,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens that are seen together.  \\[default: 512, at most the model's context]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses among windows.")] = 0,
    revision: Revision = None,
    stream: Stream = False,
    llama_version: LlamaVersion = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: DryRun = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure how much each input of the linear layers counts, for `quantize --importance`.

    The model is run once over the text, one layer in memory at a time.

    Example: irq-convert measure ./my-model importance.safetensors --text wiki.txt
    """
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.cli.console import quiet_libraries
    from irq_convert.jobs.measure.measure import estimate_measure, measure
    from irq_convert.jobs.measure.options import MeasureOptions

    options = MeasureOptions(
        text=text,
        tokens=tokens,
        window=window,
        seed=seed,
        device=device,
        threads=threads,
        stream=stream,
        llama_version=llama_version,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    quiet_libraries()
    with ProgressBar("steps") as bar:
        run = estimate_measure if dry_run else measure
        found = run(model, out, options, revision=revision, progress=bar)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found)


def _print(found: MeasureReport | MeasureEstimate) -> None:
    from irq_convert.cli.console import facts
    from irq_convert.jobs.measure.report import MeasureReport

    own = _report_rows(found) if isinstance(found, MeasureReport) else _estimate_rows(found)
    seen = f"{found.tokens:,} tokens of {found.text}, in {found.windows:,} windows"
    facts([("source", f"{found.model}, run {found.how}"), ("text", seen), *own])


def _report_rows(found: MeasureReport) -> list[tuple[str, str]]:
    from irq_convert.checkpoint.system import short_bytes
    from irq_convert.cli.console import seconds

    return [
        ("importance", f"{found.out}, {short_bytes(found.bytes)}"),
        ("measured", f"{found.tensors} of {found.linear} linear weights"),
        ("time", seconds(found.seconds)),
    ]


def _estimate_rows(found: MeasureEstimate) -> list[tuple[str, str]]:
    from irq_convert.checkpoint.system import short_bytes

    free = "free" if found.disk_needed <= found.disk_free else "free: not enough"
    return [
        ("would write", found.out),
        ("would measure", f"{found.linear} linear weights"),
        ("memory", f"{short_bytes(found.memory)} for weights"),
        ("disk needed", f"{found.disk_needed:,} bytes ({short_bytes(found.disk_free)} {free})"),
    ]
