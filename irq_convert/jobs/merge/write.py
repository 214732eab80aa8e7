"""A merged model, dense or an artifact again: written, recorded, checked and reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irq_convert.artifact.manifest import MANIFEST_NAME
from irq_convert.artifact.results import MERGE_NAME, folder_bytes
from irq_convert.artifact.structure import StoredTensor
from irq_convert.checkpoint.files import require_readable, write_json_atomic
from irq_convert.errors import IrqError
from irq_convert.jobs.common.kernels import load_kernels
from irq_convert.jobs.common.shard_job import WrittenShards, run_shard_job
from irq_convert.jobs.common.torchrun import RunProcesses
from irq_convert.jobs.merge.check_layers import LayerCheck, check_layers
from irq_convert.jobs.merge.check_logits import check_logits
from irq_convert.jobs.merge.inputs import Inputs
from irq_convert.jobs.merge.job import decode_outcome, merge_job
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.merge.outcome import Outcome, survival
from irq_convert.jobs.merge.plan import MergePlan, plan_merge, requantize_settings
from irq_convert.jobs.merge.provenance import bits_per_weight, dense_note, merged_manifest
from irq_convert.jobs.merge.report import LogitsCheck, MergedLayer, MergeReport
from irq_convert.jobs.merge.stored_moves import MoveCosts
from irq_convert.progress import Progress


def write_merged(
    inputs: Inputs, out: Path, options: MergeOptions, processes: RunProcesses, progress: Progress
) -> MergeReport:
    """Write `out`, a dense checkpoint or an artifact, and check it before it takes its name.

    Shards that an earlier run has left are used, as `options.resume` says. Raises `IrqError` when
    reading, writing or a check fails, or when quantizing again would lose more than
    `options.min_survival` allows; after the last two nothing is left.
    """
    plan = plan_merge(inputs.artifact, inputs.match, options)
    require_readable(inputs.artifact.folder, plan.folder.carried)
    _load_kernels(plan, progress)

    def finish(written: WrittenShards) -> MergeReport:
        outcomes = {name: decode_outcome(found) for name, found in written.results.items()}
        files = written.write_rest(plan.folder)
        survived = _survival(plan, outcomes, options)
        _write_records(plan, inputs, written.folder, outcomes, files)
        checks, logits = _check(plan, inputs, written.folder, options, progress)
        size = folder_bytes(written.folder)
        return _report(plan, inputs, out, outcomes, checks, logits, survived, size)

    return run_shard_job(merge_job(plan, inputs, out), processes, MergeReport, finish, progress)


def _load_kernels(plan: MergePlan, progress: Progress) -> None:
    """Where layers will be quantized again."""
    again = next((tensor.again for tensor in plan.tensors if tensor.again is not None), None)
    if again is not None:
        load_kernels(again, progress, threads=plan.options.threads)


def _survival(
    plan: MergePlan, outcomes: Mapping[str, Outcome], options: MergeOptions
) -> float | None:
    """What of the change is left over all layers that were quantized again; refuses too little.

    Over all of them, as one sum: a layer of which little is left weighs as much as the adapter
    changes it.
    """
    again = [outcomes[t.name] for t in plan.tensors if t.name in outcomes]
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
    if plan.options.to == MergeTo.DENSE:
        note = dense_note(inputs.base, inputs.adapter, plan.options)
        write_json_atomic(folder / MERGE_NAME, note)
    elif plan.artifact.manifest is not None:
        how = requantize_settings(plan.artifact, plan.options)
        manifest = merged_manifest(plan, inputs.base, inputs.adapter, outcomes, files, how)
        write_json_atomic(folder / MANIFEST_NAME, manifest)


def _check(
    plan: MergePlan, inputs: Inputs, folder: Path, options: MergeOptions, progress: Progress
) -> tuple[list[LayerCheck] | None, LogitsCheck]:
    """Compare the written files with base plus adapter, as far as asked for."""
    if options.check == Check.NONE:
        return None, LogitsCheck(reason="not asked for")
    layers = check_layers(plan, inputs.adapter, folder, progress)
    if options.check == Check.LAYERS:
        return layers, LogitsCheck(reason="not asked for")
    logits = check_logits(
        inputs.artifact,
        inputs.adapter,
        folder,
        plan.rounded,
        options,
        progress,
        inputs.match,
    )
    return layers, logits


def _how(plan: MergePlan, name: str, outcomes: Mapping[str, Outcome]) -> str:
    outcome = outcomes.get(name)
    if plan.options.to == MergeTo.DENSE or outcome is None:
        return "dense"
    if outcome.restated:
        return "tau" if outcome.scale is None else "statistics"
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
    scales = [outcome.scale for outcome in outcomes.values() if outcome.scale is not None]
    dtypes: dict[str, int] = {}
    for tensor in plan.tensors:
        if isinstance(tensor.target, str) and isinstance(tensor.base, StoredTensor):
            dtypes[tensor.target] = dtypes.get(tensor.target, 0) + 1
    return MergeReport(
        to=plan.options.to.value,
        out=str(out),
        kind=adapter.config.kind,
        base_sha256=inputs.identity,
        adapter_sha256=adapter.sha256,
        bytes_in=artifact.checkpoint.nbytes + adapter.nbytes,
        bytes_out=size,
        dtypes=dtypes,
        layers=tuple(
            _layer(plan, tensor.name, outcomes, by_name.get(tensor.name))
            for tensor in plan.tensors
            if tensor.changed
        ),
        saved=tuple(tensor.name for tensor in plan.tensors if tensor.saved or tensor.tokens),
        untied=tuple(inputs.match.added),
        tau=sum(taus, MoveCosts()).to_dict() if taus else None,
        scale=sum(scales, MoveCosts()).to_dict() if scales else None,
        tau_dtype=plan.options.stored.value if taus or scales else None,
        survived=survived,
        bits_per_weight=bits_per_weight(plan) if plan.config is not None else None,
        layers_checked=checks is not None,
        logits=logits,
    )
