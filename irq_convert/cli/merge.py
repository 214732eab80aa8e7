"""The `merge` command: parse, call, show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.cli.console import is_main_process, main_process_only
from irq_convert.cli.merge_show import print_estimate, print_layers, print_report
from irq_convert.cli.push import push_and_show, push_target
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
    TrustRemoteCode,
    shard_bytes,
)
from irq_convert.core.objective import Objective
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.merge.options import Check, Dtype, MergeOptions, MergeTo, TauDtype

if TYPE_CHECKING:
    from irq_convert.jobs.push.push import PushOptions

_KINDS = {
    MergeTo.DENSE: "merged model",
    MergeTo.ADAPTER: "adapter",
    MergeTo.IRQ: "merged artifact",
}
"""What the Hub's side calls each result."""


def merge_command(
    base: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the artifact.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of the adapter trained on it.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    to: Annotated[
        MergeTo,
        typer.Option(
            help="dense (a normal checkpoint), adapter (a plain LoRA) or irq (an artifact)."
        ),
    ],
    dtype: Annotated[
        Dtype, typer.Option(help="Of a dense result; auto is that of each source tensor.")
    ] = Dtype.AUTO,
    tau: Annotated[
        TauDtype | None,
        typer.Option(
            help="How moved taus and scales are stored in an irq result.  "
            "\\[default: float32; uint8 where statistics were trained]"
        ),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(help="To quantize again with.  \\[default: the artifact's]"),
    ] = None,
    min_survival: Annotated[
        float,
        typer.Option(help="Refuse to quantize again when less of the adapter is left; 1 is all."),
    ] = 0.5,
    check: Annotated[
        Check,
        typer.Option(
            help="layers (on a probe), logits (both models loaded), none; auto: as memory allows."
        ),
    ] = Check.AUTO,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge an adapter that records no base, or another.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
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

    with main_process_only(same=True):
        options = MergeOptions(
            to=to,
            dtype=dtype,
            tau=tau,
            objective=None if objective is None else objective.value,
            min_survival=min_survival,
            check=check,
            any_base=any_base,
            trust_remote_code=trust_remote_code,
            threads=threads,
            overwrite=overwrite,
            max_shard_bytes=shard_bytes(max_shard_size),
            resume=resume,
        )
        target = push_target(push_to_hub, _KINDS[to], private=private, revision=push_revision)
    if not dry_run:
        with main_process_only():
            _merge(base, adapter, out, options, as_json, target)
    elif is_main_process():
        _dry_run(base, adapter, out, options, as_json)


def _dry_run(base: Path, adapter: Path, out: Path, options: MergeOptions, as_json: bool) -> None:
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.jobs.merge.estimate import estimate_merge

    with ProgressBar() as bar:
        found = estimate_merge(base, adapter, out, options, progress=bar)
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
    from irq_convert.cli.bar import ProgressBar
    from irq_convert.jobs.merge.merge import merge

    with ProgressBar() as bar:
        report = merge(base, adapter, out, options, progress=bar)
    if not is_main_process():
        return
    if not as_json:
        print_report(report)
        print_layers(report)
    push_and_show(report.to_dict(), out, target, as_json)
