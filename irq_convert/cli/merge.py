"""The `merge` command: parse, call, show."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.merge_show import print_estimate, print_layers, print_report
from irq_convert.cli.push import check_target, print_push, push_result
from irq_convert.cli.shared import (
    AsJson,
    DryRun,
    MaxShardSize,
    Overwrite,
    Private,
    PushRevision,
    PushToHub,
    Resuming,
    Threads,
)
from irq_convert.cli.voice import one_voice, speaks
from irq_convert.errors import UsageError
from irq_convert.jobs.resume import Resume

if TYPE_CHECKING:
    from irq_convert.hub.push import PushOptions
    from irq_convert.merge.options import MergeOptions


# Spelled out here, as in irq_convert.merge.options, so that help needs no numerics.
class To(StrEnum):
    """What is written."""

    DENSE = "dense"
    ADAPTER = "adapter"
    IRQ = "irq"


class OutDtype(StrEnum):
    """Of a dense result."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class TauDtype(StrEnum):
    """Of a moved tau."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    UINT8 = "uint8"


class Checking(StrEnum):
    """How the result is checked."""

    AUTO = "auto"
    LAYERS = "layers"
    LOGITS = "logits"
    NONE = "none"


class Objective(StrEnum):
    """Of quantizing again."""

    ENTROPY = "entropy"
    MSE = "mse"
    NONE = "none"


def merge_command(
    base: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the artifact.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter trained on it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    to: Annotated[
        To,
        typer.Option(
            help="dense (a normal checkpoint), adapter (a plain LoRA) or irq (an artifact)."
        ),
    ],
    dtype: Annotated[
        OutDtype, typer.Option(help="Of a dense result; auto is that of each source tensor.")
    ] = OutDtype.AUTO,
    tau: Annotated[
        TauDtype, typer.Option(help="How moved taus are stored in an irq result.")
    ] = TauDtype.FLOAT32,
    objective: Annotated[
        Objective | None,
        typer.Option(help="To quantize again with.  \\[default: the artifact's]"),
    ] = None,
    min_survival: Annotated[
        float,
        typer.Option(help="Refuse to quantize again when less of the adapter is left; 1 is all."),
    ] = 0.5,
    check: Annotated[
        Checking,
        typer.Option(
            help="layers (on a probe), logits (both models loaded), none; auto: as memory allows."
        ),
    ] = Checking.AUTO,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge an adapter that records no base, or another.")
    ] = False,
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
    """Merge an adapter into its artifact, and check the result against the two.

    dense: a checkpoint in 16 or 32 bits, one rounding from base plus adapter.
    adapter: a plain LoRA that any tool loads, the same function.
    irq: an artifact; exact for block-pooled adapters, for others measured.

    Example: irq-convert merge ./model-irq-nf4 ./adapter ./merged --to dense
    """
    from irq_convert.merge.options import Check, Dtype, MergeOptions, Target, Tau

    with one_voice(same=True):
        if not 1e-9 <= max_shard_size < 1e9:
            raise UsageError(
                f"--max-shard-size {max_shard_size}: a positive number of GB is needed"
            )
        options = MergeOptions(
            to=Target(to.value),
            dtype=Dtype(dtype.value),
            tau=Tau(tau.value),
            objective=None if objective is None else objective.value,
            min_survival=min_survival,
            check=Check(check.value),
            any_base=any_base,
            threads=threads,
            overwrite=overwrite,
            max_shard_bytes=int(max_shard_size * 1e9),
            resume=resume,
        )
        target = check_target(push_to_hub, private=private, revision=push_revision)
    if not dry_run:
        with one_voice():
            _merge(base, adapter, out, options, as_json, target)
    elif speaks():
        _dry_run(base, adapter, out, options, as_json)


def _dry_run(base: Path, adapter: Path, out: Path, options: MergeOptions, as_json: bool) -> None:
    from irq_convert.cli.bar import ConversionBar
    from irq_convert.merge.estimate import estimate

    with ConversionBar() as bar:
        found = estimate(base, adapter, out, options, progress=bar)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        print_estimate(found)


def _merge(
    base: Path,
    adapter: Path,
    out: Path,
    options: MergeOptions,
    as_json: bool,
    target: tuple[str, PushOptions] | None,
) -> None:
    from irq_convert.cli.bar import ConversionBar
    from irq_convert.merge.run import merge_adapter

    with ConversionBar() as bar:
        report = merge_adapter(base, adapter, out, options, progress=bar)
    if not speaks():
        return
    if not as_json:
        print_report(report)
        print_layers(report)
    pushed = push_result(out, target) if target else None
    if as_json:
        more = {"push": pushed.to_dict()} if pushed else {}
        typer.echo(json.dumps(report.to_dict() | more, indent=2))
    elif pushed:
        print_push(pushed)
