"""The main job: any checkpoint in, a verified artifact out."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.manifest import (
    MANIFEST_NAME,
    build_manifest,
    describe_source,
    describe_tensor,
    is_listed,
    stored_as,
    total_stats,
)
from irq_convert.artifact.results import check_result_folder
from irq_convert.checkpoint.arranged import SourceHints
from irq_convert.checkpoint.disk import remove_leftovers
from irq_convert.checkpoint.files import require_readable, write_json_atomic
from irq_convert.checkpoint.locate import Fetch, find_folder, open_source
from irq_convert.checkpoint.source import Checkpoint
from irq_convert.core.tensor_stats import TensorStats, decode_stats
from irq_convert.errors import UsageError
from irq_convert.jobs.calibration.workspace import mark_finished, remove_finished
from irq_convert.jobs.common.kernels import load_kernels
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.common.ranks import Ranks
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.common.shard_job import WrittenShards, run_shard_job
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.quantize.calibrated import Fitted
from irq_convert.jobs.quantize.fitted_target import fitted_weights
from irq_convert.jobs.quantize.importance import Weighing, find_importance, plan_importance
from irq_convert.jobs.quantize.job import quantize_job, refuse_early
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan, plan_quantize
from irq_convert.jobs.quantize.report import QuantizeReport, WorstTensor
from irq_convert.jobs.quantize.target import Sized, reach_target
from irq_convert.progress import Progress
from irq_convert.version import PRODUCER

WORST = 3


def quantize(
    model: str | Path,
    out: Path | str | None = None,
    options: QuantizeOptions | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizeReport:
    """Quantize the linear layers of `model` into the new folder `out`; everything else is copied.

    `model` is a folder or a Hub id; `out` is by default NAME-irq-CODEBOOK in the current folder.
    `options`, or single `settings` as `QuantizeOptions.of` takes them (`bits=3, block_size=64`).

    The folder appears under its name only when it is complete. Same source and same options give
    the same bytes, whatever the threads, tiles or device. `options.overwrite` replaces an older
    artifact, and no other folder. What an earlier run of the same has finished is used, as
    `options.resume` says. Under torchrun the processes share the work, and all return the report.

    Raises `UsageError` for a request that cannot be served and `IrqError` for a source or disk that
    fails; shards that are finished then are left in `<out>.partial`, and nothing else.
    """
    begun = time.perf_counter()
    options = chosen(QuantizeOptions.of, options, settings)
    model, out = str(model), default_output(model, options) if out is None else Path(out)
    with RunProcesses() as processes:
        if processes.ranks.first:
            remove_leftovers(out)
            remove_finished(out)
        options = for_process(options, processes.ranks)
        progress = (progress if processes.ranks.first else None) or Progress()
        report = _quantize(model, out, options, revision, processes, progress)
    return replace(report, seconds=time.perf_counter() - begun)


def default_output(model: str | Path, options: QuantizeOptions) -> Path:
    """`NAME-irq-CODEBOOK`, or `-mix`, in the current folder; "." and ".." have names, too."""
    name = os.path.basename(os.path.abspath(model))  # noqa: PTH100, PTH119 - links keep their name
    kind = options.spec.codebook if options.target is None else "mix"
    return Path(f"{name or 'model'}-irq-{kind}")


def for_process(options: QuantizeOptions, ranks: Ranks) -> QuantizeOptions:
    """`options` with the device and the CPU threads that this process has for itself.

    Raises `UsageError` for a device that cannot be used here.
    """
    device = ranks.device(options.device)
    if device != "cpu":
        try:
            torch.ones(1, device=device).item()  # "meta" allocates and holds nothing
            if device.startswith("cuda:"):
                torch.cuda.set_device(device)
        except Exception as error:  # each backend fails in its own way
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"--device {device}: not usable here ({reason})") from None
    return replace(options, device=device, threads=ranks.threads(options.threads))


def _quantize(
    model: str,
    out: Path,
    options: QuantizeOptions,
    revision: str | None,
    processes: RunProcesses,
    progress: Progress,
) -> QuantizeReport:
    check_output_folder(model, out, options)
    file = find_importance(options)
    checkpoint = open_quantize_source(model, revision, options)
    checkpoint.fetcher.keep = options.resume != Resume.NEVER
    with checkpoint.fetcher:
        checkpoint.fetcher.tell = lambda text: progress.stage(text or "quantizing")
        progress.stage("planning")
        plan = plan_quantize(checkpoint, options, shards_only=not processes.ranks.first)
        for note in plan.notes:
            progress.note(note)
        require_readable(checkpoint.folder, plan.folder.carried)
        weighing = plan_importance(file, plan, progress)
        if options.computes_first:
            if processes.ranks.first:
                refuse_early(plan, model, out, options, weighing)
            if options.resume == Resume.REQUIRED:  # something is there: layers, perhaps no shard
                options = replace(options, resume=Resume.AUTO)
        sized = reach_target(plan, model, out, options, weighing, processes, progress)
        load_kernels(options.spec, progress, device=options.device, threads=options.threads)
        lent = fitted_weights(sized, model, out, options, processes, progress)
        with lent as (taken, fitted):
            return _write_shards(taken, model, out, options, processes, progress, fitted, weighing)


def _write_shards(
    sized: Sized,
    model: str,
    out: Path,
    options: QuantizeOptions,
    processes: RunProcesses,
    progress: Progress,
    fitted: Fitted | None,
    weighing: Weighing | None,
) -> QuantizeReport:
    plan = sized.plan
    record = None if fitted is None else fitted.record
    of_data = {} if record is None else {"calibration_record": record}
    made = None if fitted is None else fitted.kept
    job = quantize_job(
        plan, model, out, options, of_data=of_data, calibrated=made, weighing=weighing
    )
    importance = None if weighing is None else weighing.record

    def finish(written: WrittenShards) -> QuantizeReport:
        progress.stage("checksums")
        files = written.write_rest(plan.folder)
        stats = {name: decode_stats(found) for name, found in written.results.items()}
        of_data = {"calibration": record, "importance": importance, "target": sized.record}
        manifest = _manifest(plan, model, options, stats, files, of_data)
        write_json_atomic(written.folder / MANIFEST_NAME, manifest)
        size = (written.folder / MANIFEST_NAME).stat().st_size
        size += sum(int(entry["bytes"]) for entry in files.values())
        if fitted is not None:
            mark_finished(out)
        return _report(plan, out, manifest, size)

    return run_shard_job(job, processes, QuantizeReport, finish, progress)


def open_quantize_source(model: str, revision: str | None, options: QuantizeOptions) -> Checkpoint:
    """The source, its files fetched as they are read; its fetcher has to be closed."""
    fetch = Fetch.STREAM if options.stream else Fetch.AS_READ
    return open_source(model, revision, fetch, SourceHints(llama_version=options.llama_version))


def check_output_folder(model: str, out: Path, options: QuantizeOptions) -> None:
    """Refuse an `out` that cannot be written before anything is downloaded or computed.

    Raises `UsageError` as `check_result_folder`: only artifacts are overwritten.
    """
    source = find_folder(model)
    inputs = [] if source is None else [source]
    check_result_folder(out, inputs, options.overwrite, artifacts_only=True)


def _manifest(
    plan: QuantizePlan,
    model: str,
    options: QuantizeOptions,
    stats: Mapping[str, TensorStats],
    files: Mapping[str, Mapping[str, Any]],
    of_data: Mapping[str, Mapping[str, Any] | None],
) -> dict[str, Any]:
    listed = {name: entry for name, entry in files.items() if is_listed(name)}
    tensors = {
        t.info.name: describe_tensor(t.info, t.spec.codebook, t.spec.block_size, stats[t.info.name])
        for t in plan.quantized
        if t.spec is not None
    }
    totals = {
        "weights": plan.weights,
        "quantized_weights": plan.quantized_weights,
        "bytes": sum(int(entry["bytes"]) for entry in listed.values()),
        "bits_per_weight": plan.bits_per_weight,
        **total_stats(stats.values()),
    }
    return build_manifest(
        producer=PRODUCER,
        source=describe_source(plan.checkpoint, model),
        options=options.to_dict(),
        files=listed,
        tensors=tensors,
        totals=totals,
        **of_data,
    )


def _report(plan: QuantizePlan, out: Path, manifest: dict[str, Any], size: int) -> QuantizeReport:
    entries = manifest["tensors"].items()
    worst = sorted(entries, key=lambda item: -item[1]["relative_error"])[:WORST]
    totals = manifest["totals"]
    return QuantizeReport(
        out=str(out),
        decided_by=plan.decided_by,
        bytes_in=plan.bytes_in,
        bytes_out=size,
        weights=plan.weights,
        quantized_weights=plan.quantized_weights,
        bits_per_weight=plan.bits_per_weight,
        entropy_plain=totals["entropy_plain"],
        entropy=totals["entropy"],
        relative_error=totals["relative_error"],
        worst=tuple(WorstTensor(n, e["codebook"], e["relative_error"]) for n, e in worst),
        seconds=0.0,
        kept=plan.kept,
        calibration=manifest.get("calibration"),
        importance=manifest.get("importance"),
        target=manifest.get("target"),
        source_format=stored_as(manifest["source"]),
    )
