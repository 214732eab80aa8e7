"""The job: an artifact in, a folder that another program loads out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.identity import artifact_identity
from irq_convert.artifact.results import (
    EXPORT_NAME,
    check_result_folder,
    describe_base,
    folder_bytes,
)
from irq_convert.checkpoint.disk import output_folder, remove_leftovers, require_space
from irq_convert.checkpoint.files import write_json_atomic
from irq_convert.checkpoint.system import free_bytes
from irq_convert.core.threads import torch_threads
from irq_convert.errors import UsageError
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.export.options import ExportOptions
from irq_convert.jobs.export.registry import find_target
from irq_convert.jobs.export.report import ExportEstimate, ExportReport, storages
from irq_convert.jobs.export.target import ExportPlan, Target
from irq_convert.progress import Progress
from irq_convert.remote_code import remote_code
from irq_convert.version import PRODUCER

_NOTE_BYTES = 1 << 16


def export(
    folder: Path | str,
    out: Path | str,
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> ExportReport:
    """Export the artifact in `folder` to the new folder `out`, as `options.to` says.

    `options`, or single `settings` of `ExportOptions` (`to="mlx"`, which is needed).

    The folder appears under its name only when it is complete. Same artifact and same options give
    the same bytes, whatever the threads or tiles. Memory is bounded by tiles of rows. Raises
    `UsageError` for a request that cannot be served, such as an artifact that the target cannot
    hold, and `IrqError` for an artifact or disk that fails; nothing is left behind then.
    """
    begun = time.perf_counter()
    options, progress = chosen(ExportOptions, options, settings), progress or Progress()
    remove_leftovers(Path(out))
    with torch_threads(options.threads), remote_code(options.trust_remote_code):
        job = _prepare(Path(folder), Path(out), options, progress)
        require_space(job.out, job.plan.bytes_out + _NOTE_BYTES, "write the export")
        with output_folder(job.out, job.plan.artifact.folder, options.overwrite) as staging:
            written = job.target.write(job.plan, staging, progress)
            write_json_atomic(staging / EXPORT_NAME, _note(job))
            size = folder_bytes(staging)
    return ExportReport(
        artifact=str(folder),
        artifact_sha256=job.identity,
        to=options.to,
        out=str(out),
        storages=storages(job.plan.tensors),
        bytes_in=job.plan.artifact.checkpoint.nbytes,
        bytes_out=size,
        differences=tuple(written.differences),
        notes=(*job.plan.notes, *written.notes),
        seconds=time.perf_counter() - begun,
    )


def estimate_export(
    folder: Path | str,
    out: Path | str,
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> ExportEstimate:
    """What `export` with the same arguments would write, without writing anything.

    Raises what the export would raise before it writes, but for a full disk.
    """
    options = chosen(ExportOptions, options, settings)
    with torch_threads(options.threads), remote_code(options.trust_remote_code):
        job = _prepare(Path(folder), Path(out), options, progress or Progress())
    return ExportEstimate(
        artifact=str(folder),
        artifact_sha256=job.identity,
        to=options.to,
        summary=job.target.summary,
        out=str(out),
        storages=storages(job.plan.tensors),
        files=dict(job.plan.files),
        bytes_in=job.plan.artifact.checkpoint.nbytes,
        bytes_out=job.plan.bytes_out,
        disk_needed=job.plan.bytes_out + _NOTE_BYTES,
        disk_free=free_bytes(job.out),
        notes=job.plan.notes,
    )


@dataclass(frozen=True)
class _Job:
    """A plan, and what it was made from."""

    target: Target
    plan: ExportPlan
    identity: str
    out: Path


def _prepare(folder: Path, out: Path, options: ExportOptions, progress: Progress) -> _Job:
    target = find_target(options.to)
    check_options(target, options)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the folder of an artifact")
    check_result_folder(out, [folder], options.overwrite)
    progress.stage("reading headers")
    artifact = open_artifact(folder)
    return _Job(target, target.plan(artifact, options, progress), artifact_identity(folder), out)


def check_options(target: Target, options: ExportOptions) -> None:
    """Refuse options that mean nothing to `target`, and a target whose packages are missing."""
    defaults = ExportOptions.__dataclass_fields__
    for name, option in _OPTIONS.items():
        if getattr(options, name) != defaults[name].default and name not in target.takes:
            raise UsageError(f"{option} means nothing for --to {target.name}: leave it out")
    if options.dtype not in target.dtypes:
        known = ", ".join(target.dtypes)
        raise UsageError(f"--dtype {options.dtype}: choose one of {known} for --to {target.name}")
    if options.fallback is not None and options.fallback not in target.fallbacks:
        known = ", ".join(target.fallbacks)
        raise UsageError(
            f"--fallback {options.fallback}: choose one of {known} for --to {target.name}"
        )
    for package in target.packages:
        if find_spec(package) is None:
            raise UsageError(
                f"--to {target.name} needs the package {package}: pip install {package}"
            )


_OPTIONS = {
    "dtype": "--dtype",
    "fallback": "--fallback",
    "refit": "--refit",
    "max_shard_bytes": "--max-shard-size",
}


def _note(job: _Job) -> dict[str, object]:
    """`irq_export.json`: where the folder comes from."""
    artifact = job.plan.artifact
    return {
        "format": "irq-export",
        "format_version": 1,
        "producer": PRODUCER,
        "artifact": describe_base(artifact.folder.resolve().name, job.identity, artifact.manifest),
        "options": job.plan.options.to_dict(),
    }
