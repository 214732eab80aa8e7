"""The job: an artifact and an adapter in, one checked result out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from irq_convert.artifact.results import folder_bytes
from irq_convert.checkpoint.disk import output_folder, remove_leftovers, require_space
from irq_convert.core.threads import torch_threads
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.common.result import run_once
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.merge.check_layers import LayerCheck
from irq_convert.jobs.merge.check_logits import check_logits
from irq_convert.jobs.merge.fold import RECORD_BYTES, check_folded, folded_bytes, write_folded
from irq_convert.jobs.merge.inputs import Inputs, open_inputs
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.merge.report import LogitsCheck, MergedLayer, MergeReport
from irq_convert.jobs.merge.write import write_merged
from irq_convert.progress import Progress
from irq_convert.remote_code import remote_code


def merge(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    options: MergeOptions | None = None,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeReport:
    """Merge the adapter folder into the artifact folder `base` and write the new folder `out`.

    `options`, or single `settings` of `MergeOptions` (`to="irq", tau="float16"`).
    `options.to` says what is written: a dense checkpoint, a plain LoRA, or an artifact. The folder
    appears under its name only when it is complete and has passed its check. Memory is bounded by
    tiles of rows; only the check of logits, which is made where both models fit, loads models. What
    an earlier run of the same has finished is used, as `options.resume` says. Under torchrun the
    processes share the work (one folds an adapter), and all return the report.

    Raises `UsageError` for a request that cannot be served, `IrqError` for inputs, a disk or a
    check that fails; then finished shards are left in `<out>.partial`, but for a check nothing is.
    """
    begun = time.perf_counter()
    options, out = chosen(MergeOptions, options, settings), Path(out)
    with RunProcesses() as processes, remote_code(options.trust_remote_code):
        ranks = processes.ranks
        if ranks.first:
            remove_leftovers(out)
        options = replace(options, threads=ranks.threads(options.threads))
        progress = (progress if ranks.first else None) or Progress()
        progress.stage("reading headers")
        inputs = open_inputs(Path(base), Path(adapter), out, options)
        options = options.for_adapter(bool(inputs.adapter.statistics))
        with torch_threads(options.threads):
            if options.to == MergeTo.ADAPTER:
                report = run_once(
                    processes, MergeReport, lambda: _fold(inputs, out, options, progress)
                )
            else:
                report = write_merged(inputs, out, options, processes, progress)
    return replace(report, seconds=time.perf_counter() - begun)


def _fold(inputs: Inputs, out: Path, options: MergeOptions, progress: Progress) -> MergeReport:
    """A plain LoRA."""
    artifact, adapter = inputs.artifact, inputs.adapter
    require_space(out, folded_bytes(adapter, inputs.match) + RECORD_BYTES, "write the adapter")
    checks: list[LayerCheck] | None = None
    logits = LogitsCheck(reason="not asked for")
    with output_folder(out, artifact.folder, options.overwrite) as staging:
        write_folded(adapter, inputs.match, staging, inputs.base, progress)
        if options.check != Check.NONE:
            checks = check_folded(adapter, inputs.match, staging, progress)
        if options.check in (Check.AUTO, Check.LOGITS):
            rounded = {part.dtype for each in adapter.layers.values() for part in (each.a, each.b)}
            logits = check_logits(
                artifact, adapter, staging, rounded, options, progress, inputs.match
            )
        size = folder_bytes(staging)
    by_name = {check.tensor: check for check in checks or ()}
    return MergeReport(
        to=options.to.value,
        out=str(out),
        kind=adapter.config.kind,
        base_sha256=inputs.identity,
        adapter_sha256=adapter.sha256,
        bytes_in=adapter.nbytes,
        bytes_out=size,
        dtypes={},
        layers=tuple(MergedLayer(n, "folded", check=by_name.get(n)) for n in inputs.match.every),
        saved=(*inputs.match.saved, *inputs.match.tokens),
        layers_checked=checks is not None,
        logits=logits,
    )
