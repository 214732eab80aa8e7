"""The `quantize` command: parse, call, show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.console import is_main_process, main_process_only
from irq_convert.cli.push import push_and_show, push_target
from irq_convert.cli.quantize_show import print_estimate, print_report, warn_of_little
from irq_convert.cli.shared import (
    AsJson,
    DryRun,
    LlamaVersion,
    MaxShardSize,
    Overwrite,
    Private,
    PushRevision,
    PushToHub,
    Resuming,
    Revision,
    Stream,
    Threads,
    shard_bytes,
)
from irq_convert.cli.target_option import (
    AtLeast,
    AtMost,
    SensitivityOption,
    TargetBits,
    TargetSize,
    TargetText,
    TargetTokens,
    UniformWithin,
    rule,
    target_options,
)
from irq_convert.core.codebook import (
    FAMILIES,
    FAMILIES_IN_WORDS,
    WIDTHS_IN_WORDS,
    in_words,
)
from irq_convert.core.objective import Objective, ZeroPoint
from irq_convert.jobs.calibration.options import CORRECTION, DAMPING, TOKENS
from irq_convert.jobs.common.resume import Resume

if TYPE_CHECKING:
    from irq_convert.jobs.calibration.options import CalibrationOptions
    from irq_convert.jobs.push.push import PushOptions
    from irq_convert.jobs.quantize.options import QuantizeOptions


def quantize_command(
    model: Annotated[str, typer.Argument(help="Local folder or Hub id of the source model.")],
    out: Annotated[
        Path | None,
        typer.Argument(
            help="Folder to create.  \\[default: NAME-irq-CODEBOOK here, or NAME-irq-mix]"
        ),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help=f"Bits per weight: {WIDTHS_IN_WORDS}.  \\[default: 4]")
    ] = None,
    codebook: Annotated[
        str | None, typer.Option(help=f"{FAMILIES_IN_WORDS}.  \\[default: nf]")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale and a tau.  \\[default: 64]")
    ] = None,
    target_size: TargetSize = None,
    target_bits: TargetBits = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help=f"{in_words(f'{each} ({each.meaning})' for each in Objective)}.  "
            f"\\[default: {', '.join(f'{f.objective} for {f.name}' for f in FAMILIES.values())}; "
            "mse with a text, importance or a target]"
        ),
    ] = None,
    refine: Annotated[
        int, typer.Option(help="Most rounds of least squares on tau, scale and codes.")
    ] = 0,
    zero_point: Annotated[
        ZeroPoint,
        typer.Option(help="integer (--codebook int only): blocks that other engines hold exactly."),
    ] = ZeroPoint.FLOAT,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Copy tensors that match; repeatable.")
    ] = None,
    bits_for: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=BITS", help="Other bits for tensors that match; repeatable."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Fit the weights to a text, layer by layer: a file (text, JSONL), a Hub dataset, "
            "or `self`, which samples from the model.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="With --calibrate: most tokens to take.")
    ] = TOKENS,
    calibration_window: Annotated[
        int | None,
        typer.Option(
            help="With --calibrate: tokens that are seen together.  \\[default: 512, at most the "
            "model's context]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="With --calibrate: chooses among windows.")] = 0,
    correction: Annotated[
        list[float] | None,
        typer.Option(
            help="With --calibrate: how much of earlier layers' errors is corrected for; of "
            f"several the best on held-out windows.  \\[default: {CORRECTION:g}]"
        ),
    ] = None,
    damping: Annotated[
        list[float] | None,
        typer.Option(
            help="With --calibrate: holds the solver back, in mean diagonals; of several the best."
            f"  \\[default: {DAMPING:g}]"
        ),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weigh errors by the inputs' mean squares: a file of `measure`, or an imatrix.",
        ),
    ] = None,
    target_text: TargetText = None,
    target_tokens: TargetTokens = None,
    sensitivity: SensitivityOption = None,
    uniform_within: UniformWithin = None,
    at_least: AtLeast = None,
    at_most: AtMost = None,
    include_towers: Annotated[
        bool,
        typer.Option("--include-towers", help="Quantize vision and audio towers, too."),
    ] = False,
    include_embeddings: Annotated[
        bool,
        typer.Option(
            "--include-embeddings", help="Quantize input embeddings and the output head, too."
        ),
    ] = False,
    revision: Revision = None,
    stream: Stream = False,
    llama_version: LlamaVersion = None,
    device: Annotated[str, typer.Option(help="Where to search: cpu, cuda, cuda:1, mps.")] = "cpu",
    threads: Threads = None,
    max_shard_size: MaxShardSize = 5.0,
    resume: Resuming = Resume.AUTO,
    push_to_hub: PushToHub = None,
    private: Private = False,
    push_revision: PushRevision = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model to 2, 3 or 4 bits, block by block.

    Linear layers are quantized, embeddings and the head when asked; all else is kept.

    Example: irq-convert quantize --bits 3 meta-llama/Llama-2-13b
    """
    from irq_convert.jobs.quantize.options import QuantizeOptions

    with main_process_only(same=True):
        options = QuantizeOptions.of(
            bits=bits,
            codebook=codebook,
            block_size=block_size,
            objective=objective,
            refine=refine,
            zero_point=zero_point,
            keep=tuple(keep or ()),
            bits_for=tuple(rule("--bits-for", item) for item in bits_for or ()),
            include_towers=include_towers,
            include_embeddings=include_embeddings,
            device=device,
            threads=threads,
            overwrite=overwrite,
            max_shard_bytes=shard_bytes(max_shard_size),
            stream=stream,
            llama_version=llama_version,
            resume=resume,
            calibrate=_calibration(
                calibrate, calibration_tokens, calibration_window, seed, correction, damping
            ),
            importance=importance,
            target=target_options(
                target_size, target_bits, target_text, target_tokens, sensitivity, uniform_within,
                at_least, at_most,
            ),
        )  # fmt: skip
        push = push_target(push_to_hub, "artifact", private=private, revision=push_revision)
    if not dry_run:
        with main_process_only():
            _quantize(model, out, options, revision, as_json, push)
    elif is_main_process():
        _dry_run(model, out, options, revision, as_json)


def _calibration(
    text: str | None,
    tokens: int,
    window: int | None,
    seed: int,
    correction: list[float] | None,
    damping: list[float] | None,
) -> CalibrationOptions | None:
    from irq_convert.jobs.calibration.options import CalibrationOptions

    if text is None:
        return None
    found = CalibrationOptions(text, tokens=tokens, window=window, seed=seed)
    return replace(
        found,
        correction=tuple(correction or found.correction),
        damping=tuple(damping or found.damping),
    )


def _dry_run(
    model: str, out: Path | None, options: QuantizeOptions, revision: str | None, as_json: bool
) -> None:
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.jobs.quantize.estimate import estimate_quantize

    with ProgressBar() as bar:
        found = estimate_quantize(model, out, options, revision=revision, progress=bar)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        print_estimate(found)
    warn_of_little(found)


def _quantize(
    model: str,
    out: Path | None,
    options: QuantizeOptions,
    revision: str | None,
    as_json: bool,
    target: tuple[str, PushOptions] | None,
) -> None:
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.jobs.quantize.quantize import quantize

    with ProgressBar() as bar:
        report = quantize(model, out, options, revision=revision, progress=bar)
    if not is_main_process():
        return
    if not as_json:
        print_report(report, options)
    warn_of_little(report)
    push_and_show(report.to_dict(), Path(report.out), target, as_json)
