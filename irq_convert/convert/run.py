"""The main job: any checkpoint in, a verified artifact out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irq_convert import __version__
from irq_convert.artifact.manifest import (
    MANIFEST_NAME,
    build_manifest,
    describe_source,
    describe_tensor,
    is_listed,
    total_stats,
)
from irq_convert.checkpoint.disk import check_output, remove_leftovers
from irq_convert.checkpoint.files import (
    copy_file_atomic,
    require_readable,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from irq_convert.checkpoint.locate import Fetch, open_source
from irq_convert.checkpoint.system import existing_parent, os_errors
from irq_convert.convert.options import ConvertOptions
from irq_convert.convert.plan import ConversionPlan, make_plan
from irq_convert.convert.report import ConvertReport, WorstTensor
from irq_convert.convert.resume import conversion_job, decode_stats
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.stats import TensorStats
from irq_convert.errors import UsageError
from irq_convert.jobs.meeting import Meeting
from irq_convert.jobs.progress import Progress
from irq_convert.jobs.ranks import Ranks
from irq_convert.jobs.resume import Resume
from irq_convert.jobs.run import Written, run_job

WORST = 3


def quantize_checkpoint(
    model: str,
    out: Path | str,
    options: ConvertOptions | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Quantize the linear layers of `model` into the new folder `out`; everything else is copied.

    The folder appears under its name only when it is complete. Same source and same options give
    the same bytes, whatever the threads, tiles or device. `options.overwrite` replaces an older
    artifact, and no other folder. What an earlier run of the same has finished is used, as
    `options.resume` says. Under torchrun the processes share the work, and all return the report.

    Raises `UsageError` for a request that cannot be served and `IrqError` for a source or disk that
    fails; shards that are finished then are left in `<out>.partial`, and nothing else.
    """
    begun = time.perf_counter()
    options, out = options or ConvertOptions(), Path(out)
    with Meeting() as meeting:
        if meeting.ranks.first:
            remove_leftovers(out)
        options = for_process(options, meeting.ranks)
        progress = (progress if meeting.ranks.first else None) or Progress()
        report = _quantize(model, out, options, revision, meeting, progress)
    return replace(report, seconds=time.perf_counter() - begun)


def for_process(options: ConvertOptions, ranks: Ranks) -> ConvertOptions:
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
    options: ConvertOptions,
    revision: str | None,
    meeting: Meeting,
    progress: Progress,
) -> ConvertReport:
    check_target(model, out, options)
    checkpoint = open_source(model, revision, Fetch.STREAM if options.stream else Fetch.AS_READ)
    checkpoint.supply.keep = options.resume != Resume.NEVER
    with checkpoint.supply:
        checkpoint.supply.tell = lambda text: progress.stage(text or "quantizing")
        progress.stage("planning")
        plan = make_plan(checkpoint, options)
        require_readable(checkpoint.folder, plan.carried_files)
        compile_kernels(options, progress)
        job = conversion_job(plan, model, out, options)

        def finish(written: Written) -> ConvertReport:
            files = _write_rest(plan, written, progress)
            stats = {name: decode_stats(found) for name, found in written.results.items()}
            manifest = _manifest(plan, model, options, stats, files)
            write_json_atomic(written.folder / MANIFEST_NAME, manifest)
            size = (written.folder / MANIFEST_NAME).stat().st_size
            size += sum(int(entry["bytes"]) for entry in files.values())
            return _report(plan, out, manifest, size)

        return run_job(job, meeting, ConvertReport, finish, progress)


def check_target(model: str, out: Path, options: ConvertOptions) -> None:
    """Refuse an `out` that cannot be written before anything is downloaded or computed.

    Raises `UsageError` as `check_output`, for a path that leads through a file, and for a folder
    that holds something else than an artifact: --overwrite deletes what it replaces.
    """
    real = check_output(out, _local_folder(model), options.overwrite)
    with os_errors("look at it", out):
        parent = existing_parent(real)
        if not parent.is_dir():
            raise UsageError(f"{out}: {parent} is a file, not a folder; choose another output")
        if real.is_dir() and any(real.iterdir()) and not (real / MANIFEST_NAME).is_file():
            raise UsageError(
                f"{out}: holds no artifact, and only artifacts are overwritten; remove it "
                "yourself or choose another folder"
            )


def _local_folder(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise UsageError(f"{model}: no such folder ({error})") from None
    with os_errors("look at it", path):
        return path if model and path.exists() else None


def compile_kernels(options: ConvertOptions, progress: Progress) -> None:
    """Run the search once on nothing: the first time on a machine, compiling takes a minute."""
    progress.stage("loading kernels (compiled once per machine)")
    spec = options.spec
    nothing = torch.zeros(1, spec.block_size, device=options.device)
    quantize_tensor(nothing, spec, threads=options.threads)


def _write_rest(
    plan: ConversionPlan, written: Written, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Write everything else but the manifest; returns sizes and checksums of all files."""
    folder = written.folder
    files: dict[str, dict[str, Any]] = {
        name: {"bytes": part.bytes, "sha256": part.sha256} for name, part in written.parts.items()
    }
    progress.stage("checksums")
    for name in plan.carried_files:
        copy_file_atomic(plan.checkpoint.folder / name, folder / name)
    for name, text in plan.documents.items():
        write_bytes_atomic(folder / name, text)
    for name in (*plan.carried_files, *plan.documents):
        size = (folder / name).stat().st_size
        files[name] = {"bytes": size, "sha256": sha256_file(folder / name)}
    return files


def _manifest(
    plan: ConversionPlan,
    model: str,
    options: ConvertOptions,
    stats: Mapping[str, TensorStats],
    files: Mapping[str, Mapping[str, Any]],
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
        producer=f"irq-convert {__version__}",
        source=describe_source(plan.checkpoint, model),
        options=options.to_dict(),
        files=listed,
        tensors=tensors,
        totals=totals,
    )


def _report(plan: ConversionPlan, out: Path, manifest: dict[str, Any], size: int) -> ConvertReport:
    entries = manifest["tensors"].items()
    worst = sorted(entries, key=lambda item: -item[1]["relative_error"])[:WORST]
    totals = manifest["totals"]
    return ConvertReport(
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
    )
