"""The main job: any checkpoint in, a verified artifact out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from irq_convert import __version__
from irq_convert.artifact.manifest import (
    MANIFEST_NAME,
    build_manifest,
    describe_source,
    describe_tensor,
    total_stats,
)
from irq_convert.checkpoint.disk import check_output, output_folder, require_space
from irq_convert.checkpoint.files import (
    copy_file_atomic,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from irq_convert.checkpoint.locate import locate
from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from irq_convert.checkpoint.system import existing_parent, os_errors
from irq_convert.convert.options import ConvertOptions
from irq_convert.convert.pipeline import convert_shard
from irq_convert.convert.plan import ConversionPlan, make_plan
from irq_convert.convert.progress import Progress
from irq_convert.convert.report import ConvertReport, WorstTensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.stats import TensorStats
from irq_convert.errors import UsageError

WORST = 3


def open_source(
    model: str, revision: str | None = None, *, headers_only: bool = False
) -> Checkpoint:
    """The checkpoint that `model`, a local folder or a Hub id, names."""
    found = locate(model, revision, headers_only=headers_only)
    return open_checkpoint(found.folder, found.repo_id, found.revision)


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
    artifact, and no other folder. Raises `UsageError` for a request that cannot be served and
    `IrqError` for a source or disk that fails; nothing is left behind then.
    """
    begun = time.perf_counter()
    options = options or ConvertOptions()
    progress = progress or Progress()
    out = Path(out)
    check_target(model, out, options)
    checkpoint = open_source(model, revision)
    progress.stage("planning")
    plan = make_plan(checkpoint, options)
    require_space(out, plan.bytes_needed, "write the artifact")
    compile_kernels(options, progress)
    with output_folder(out, checkpoint.folder, options.overwrite) as staging:
        progress.start(plan)
        stats, files = _write_files(plan, staging, options, progress)
        manifest = _manifest(plan, model, options, stats, files)
        write_json_atomic(staging / MANIFEST_NAME, manifest)
        size = sum((staging / name).stat().st_size for name in (*files, MANIFEST_NAME))
    return _report(plan, out, manifest, size, time.perf_counter() - begun)


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


def _write_files(
    plan: ConversionPlan, folder: Path, options: ConvertOptions, progress: Progress
) -> tuple[dict[str, TensorStats], dict[str, dict[str, Any]]]:
    """Write everything but the manifest; checksums are taken from the disk, behind the writing."""
    stats: dict[str, TensorStats] = {}
    sums: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="irq-checksum") as pool:
        for shard in plan.shards:
            stats |= convert_shard(shard, folder, options, progress)
            sums[shard.name] = pool.submit(sha256_file, folder / shard.name)
        for name in plan.carried_files:
            copy_file_atomic(plan.checkpoint.folder / name, folder / name)
            sums[name] = pool.submit(sha256_file, folder / name)
        for name, text in plan.documents.items():
            write_bytes_atomic(folder / name, text)
            sums[name] = pool.submit(sha256_file, folder / name)
        progress.stage("checksums")
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": future.result()}
            for name, future in sums.items()
        }
    return stats, files


def _manifest(
    plan: ConversionPlan,
    model: str,
    options: ConvertOptions,
    stats: Mapping[str, TensorStats],
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    listed = {name: entry for name, entry in files.items() if not _begins_with_dot(name)}
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


def _begins_with_dot(name: str) -> bool:
    """Whether the manifest leaves a file out (specification, section 7)."""
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _report(
    plan: ConversionPlan, out: Path, manifest: dict[str, Any], size: int, seconds: float
) -> ConvertReport:
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
        seconds=seconds,
    )
