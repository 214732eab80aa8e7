"""The main job: any checkpoint in, a verified artifact out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from irq_convert import __version__
from irq_convert.artifact.manifest import (
    MANIFEST_NAME,
    build_manifest,
    describe_source,
    describe_tensor,
    total_stats,
)
from irq_convert.checkpoint.disk import check_output, output_folder, require_space
from irq_convert.checkpoint.files import copy_file_atomic, sha256_file, write_json_atomic
from irq_convert.checkpoint.locate import locate
from irq_convert.checkpoint.shards import INDEX_NAME
from irq_convert.checkpoint.source import Checkpoint, open_checkpoint
from irq_convert.convert.options import ConvertOptions
from irq_convert.convert.pipeline import convert_shard
from irq_convert.convert.plan import ConversionPlan, make_plan
from irq_convert.convert.progress import Progress
from irq_convert.convert.report import ConvertReport, WorstTensor
from irq_convert.core.stats import TensorStats

MANIFEST_ROOM = 1 << 20
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
    the same bytes, whatever the threads, tiles or device. Raises `UsageError` for a request that
    cannot be served and `IrqError` for a source or disk that fails; nothing is left behind then.
    """
    begun = time.perf_counter()
    options = options or ConvertOptions()
    progress = progress or Progress()
    out = Path(out)
    local = Path(model) if Path(model).exists() else None
    check_output(out, local, options.overwrite)
    checkpoint = open_source(model, revision)
    plan = make_plan(checkpoint, options)
    require_space(out, plan.bytes_out + MANIFEST_ROOM, "write the artifact")
    with output_folder(out, checkpoint.folder, options.overwrite) as staging:
        progress.start(plan)
        stats, files = _write_files(plan, staging, options, progress)
        manifest = _manifest(plan, model, options, stats, files)
        write_json_atomic(staging / MANIFEST_NAME, manifest)
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    return _report(plan, out, manifest, size, time.perf_counter() - begun)


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
        documents = {"config.json": plan.config_json(), INDEX_NAME: plan.index_json()}
        for name, document in documents.items():
            if document is not None:
                write_json_atomic(folder / name, document)
                sums[name] = pool.submit(sha256_file, folder / name)
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
    tensors = {
        t.info.name: describe_tensor(t.info, t.spec.codebook, t.spec.block_size, stats[t.info.name])
        for t in plan.quantized
        if t.spec is not None
    }
    totals = {
        "weights": plan.weights,
        "quantized_weights": plan.quantized_weights,
        "bytes": sum(int(entry["bytes"]) for entry in files.values()),
        "bits_per_weight": plan.bits_per_weight,
        **total_stats(stats.values()),
    }
    return build_manifest(
        producer=f"irq-convert {__version__}",
        source=describe_source(plan.checkpoint, model),
        options=options.to_dict(),
        files=files,
        tensors=tensors,
        totals=totals,
    )


def _report(
    plan: ConversionPlan, out: Path, manifest: dict[str, Any], size: int, seconds: float
) -> ConvertReport:
    entries = manifest["tensors"].items()
    worst = sorted(entries, key=lambda item: -item[1]["relative_error"])[:WORST]
    totals = manifest["totals"]
    return ConvertReport(
        out=str(out),
        decided_by=plan.decided_by,
        bytes_in=plan.checkpoint.nbytes,
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
