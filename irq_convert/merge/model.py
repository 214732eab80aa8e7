"""A merged model, dense or an artifact again: written, recorded, checked and reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.config import ModuleFormat
from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.files import (
    copy_file_atomic,
    require_readable,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from irq_convert.core.quantize import quantize_tensor
from irq_convert.errors import IrqError
from irq_convert.jobs.meeting import Meeting
from irq_convert.jobs.progress import Progress
from irq_convert.jobs.run import Written, run_job
from irq_convert.merge.inputs import Inputs
from irq_convert.merge.layers import LayerCheck, check_layers
from irq_convert.merge.logits import check_logits
from irq_convert.merge.options import Check, MergeOptions, Target
from irq_convert.merge.outcome import Outcome, survival
from irq_convert.merge.plan import MERGE_NAME, MergePlan, make_plan, noted_means
from irq_convert.merge.records import bits_per_weight, dense_note, merged_manifest
from irq_convert.merge.report import LogitsCheck, MergedLayer, MergeReport
from irq_convert.merge.resume import decode_outcome, merge_job
from irq_convert.merge.target import folder_bytes
from irq_convert.merge.tau import TauCosts


def write_model(
    inputs: Inputs, out: Path, options: MergeOptions, meeting: Meeting, progress: Progress
) -> MergeReport:
    """Write `out`, a dense checkpoint or an artifact, and check it before it takes its name.

    Shards that an earlier run has left are used, as `options.resume` says. Raises `IrqError` when
    reading, writing or a check fails, or when quantizing again would lose more than
    `options.min_survival` allows; after the last two nothing is left.
    """
    plan = make_plan(inputs.artifact, inputs.match, options)
    require_readable(inputs.artifact.folder, plan.carried_files)
    _load_kernels(plan, progress)

    def finish(written: Written) -> MergeReport:
        outcomes = {name: decode_outcome(found) for name, found in written.results.items()}
        files = _write_rest(plan, written)
        survived = _survival(plan, outcomes, options)
        _write_records(plan, inputs, written.folder, outcomes, files)
        checks, logits = _check(plan, inputs, written.folder, options, progress)
        size = folder_bytes(written.folder)
        return _report(plan, inputs, out, outcomes, checks, logits, survived, size)

    return run_job(merge_job(plan, inputs, out), meeting, MergeReport, finish, progress)


def _load_kernels(plan: MergePlan, progress: Progress) -> None:
    """Quantize nothing once where layers will be: the first time on a machine, that compiles."""
    for job in plan.jobs:
        if job.again is not None:
            progress.stage("loading kernels (compiled once per machine)")
            nothing = torch.zeros(1, job.again.block_size)
            quantize_tensor(nothing, job.again, threads=plan.options.threads)
            return


def _write_rest(plan: MergePlan, written: Written) -> dict[str, dict[str, Any]]:
    """Everything but the records; returns sizes and checksums of all files."""
    folder = written.folder
    files: dict[str, dict[str, Any]] = {
        name: {"bytes": part.bytes, "sha256": part.sha256} for name, part in written.parts.items()
    }
    for name in plan.carried_files:
        copy_file_atomic(plan.artifact.folder / name, folder / name)
    for name, text in plan.documents.items():
        write_bytes_atomic(folder / name, text)
    for name in (*plan.carried_files, *plan.documents):
        size = (folder / name).stat().st_size
        files[name] = {"bytes": size, "sha256": sha256_file(folder / name)}
    return files


def _survival(
    plan: MergePlan, outcomes: Mapping[str, Outcome], options: MergeOptions
) -> float | None:
    """What of the change is left over all layers that were quantized again; refuses too little.

    Over all of them, as one sum: a layer of which little is left weighs as much as the adapter
    changes it.
    """
    again = [outcomes[job.name] for job in plan.jobs if job.name in outcomes]
    again = [outcome for outcome in again if outcome.stats is not None]
    if not again:
        return None
    overall = survival(math.fsum(o.error for o in again), math.fsum(o.change for o in again))
    if overall < options.min_survival:
        raise IrqError(
            f"quantizing again keeps {overall:.3f} of what the adapter learned, less than "
            f"--min-survival {options.min_survival:g} (1 is all, 0 and below nothing): merge --to "
            "dense, or train a block-pooled adapter (--lora block), which moves tau alone"
        )
    return overall


def _write_records(
    plan: MergePlan,
    inputs: Inputs,
    folder: Path,
    outcomes: Mapping[str, Outcome],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    if plan.options.to == Target.DENSE:
        note = dense_note(plan, inputs.identity, inputs.adapter, plan.options)
        write_json_atomic(folder / MERGE_NAME, note)
    elif plan.artifact.manifest is not None:
        assert inputs.adapter is not None
        how = noted_means(plan.artifact, plan.options)
        manifest = merged_manifest(plan, inputs.identity, inputs.adapter, outcomes, files, how)
        write_json_atomic(folder / MANIFEST_NAME, manifest)


def _check(
    plan: MergePlan, inputs: Inputs, folder: Path, options: MergeOptions, progress: Progress
) -> tuple[list[LayerCheck] | None, LogitsCheck]:
    """Compare the written files with base plus adapter, as far as asked for."""
    if options.check == Check.NONE or inputs.adapter is None:
        return None, LogitsCheck(reason="not asked for")
    layers = check_layers(plan, inputs.adapter, folder, progress)
    if options.check == Check.LAYERS:
        return layers, LogitsCheck(reason="not asked for")
    logits = check_logits(inputs.artifact, inputs.adapter, folder, plan.rounded, options, progress)
    return layers, logits


def _how(plan: MergePlan, name: str, outcomes: Mapping[str, Outcome]) -> str:
    outcome = outcomes.get(name)
    if plan.options.to == Target.DENSE or outcome is None:
        return "dense"
    if outcome.tau is not None:
        return "tau"
    return "unchanged" if outcome.stats is None else "requantized"


def _layer(
    plan: MergePlan, name: str, outcomes: Mapping[str, Outcome], check: LayerCheck | None
) -> MergedLayer:
    how, outcome = _how(plan, name, outcomes), outcomes.get(name)
    if how in ("dense", "unchanged") or outcome is None:
        return MergedLayer(name, how, check=check)
    size = math.sqrt(outcome.change / outcome.energy) if outcome.energy else 0.0
    return MergedLayer(name, how, outcome.survived, size, check)


def _report(
    plan: MergePlan,
    inputs: Inputs,
    out: Path,
    outcomes: Mapping[str, Outcome],
    checks: list[LayerCheck] | None,
    logits: LogitsCheck,
    survived: float | None,
    size: int,
) -> MergeReport:
    adapter, artifact = inputs.adapter, inputs.artifact
    by_name = {check.tensor: check for check in checks or ()}
    taus = [outcome.tau for outcome in outcomes.values() if outcome.tau is not None]
    dtypes: dict[str, int] = {}
    for job in plan.jobs:
        if not isinstance(job.target, ModuleFormat) and isinstance(job.base, StoredTensor):
            dtypes[job.target] = dtypes.get(job.target, 0) + 1
    return MergeReport(
        to=plan.options.to.value,
        out=str(out),
        kind=None if adapter is None else adapter.config.kind,
        base_sha256=inputs.identity,
        adapter_sha256=None if adapter is None else adapter.sha256,
        bytes_in=artifact.checkpoint.nbytes + (adapter.nbytes if adapter else 0),
        bytes_out=size,
        dtypes=dtypes,
        layers=tuple(
            _layer(plan, job.name, outcomes, by_name.get(job.name))
            for job in plan.jobs
            if job.adapted is not None
        ),
        saved=tuple(job.name for job in plan.jobs if job.saved is not None),
        tau=sum(taus, TauCosts()).to_dict() if taus else None,
        tau_dtype=plan.options.tau.value if taus else None,
        survived=survived,
        bits_per_weight=bits_per_weight(plan) if plan.config is not None else None,
        layers_checked=checks is not None,
        logits=logits,
    )
