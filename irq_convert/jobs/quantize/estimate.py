"""What a conversion would write and cost, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from irq_convert.artifact.manifest import stored_as
from irq_convert.checkpoint.planned_folder import PlannedShard
from irq_convert.checkpoint.source import PLAIN
from irq_convert.checkpoint.system import free_bytes
from irq_convert.core.quantize import quantize_tensor
from irq_convert.jobs.calibration.estimate import CalibrationCost, estimate_calibration
from irq_convert.jobs.common.kernels import load_kernels
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.common.ranks import Ranks
from irq_convert.jobs.common.resume import FinishedShards
from irq_convert.jobs.common.shard_job import scan_finished
from irq_convert.jobs.quantize.calibrated import plan_calibration
from irq_convert.jobs.quantize.importance import find_importance, plan_importance
from irq_convert.jobs.quantize.job import quantize_job, refuse_early
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan, TensorPlan, plan_quantize
from irq_convert.jobs.quantize.quantize import (
    check_output_folder,
    default_output,
    for_process,
    open_quantize_source,
)
from irq_convert.jobs.quantize.target import Point, target_frontier
from irq_convert.progress import Progress

_SAMPLE = (256, 4096)


@dataclass(frozen=True)
class QuantizeEstimate:
    """`bytes_out` is exact, without the manifest; `seconds` comes from `rate`, measured here.

    `rate` is in weights a second, for the search alone; reading and writing overlap with it.
    `kept` counts the numbers that would be copied, by the reason. `finished` of the `shards` are
    there already and would be used; `disk_needed` is for the others. `fetched` is the most that the
    source's files take in `fetched_to` when they come from the Hub, beside `disk_needed`.
    `source_format` says how the weights are stored, as `inspect` does; `frontier` what other
    sizes than the target would give.
    """

    model: str
    out: str
    decided_by: str
    bytes_in: int
    bytes_out: int
    disk_needed: int
    disk_free: int
    shards: int
    tensors: int
    quantized_tensors: int
    weights: int
    quantized_weights: int
    bits_per_weight: float
    rate: float
    seconds: float
    kept: Mapping[str, int] = field(default_factory=dict)
    finished: int = 0
    fetched: int = 0
    fetched_to: str | None = None
    calibration: CalibrationCost | None = None
    importance: Mapping[str, Any] | None = None
    source_format: str = PLAIN
    frontier: tuple[Point, ...] = ()

    @property
    def share(self) -> float:
        """Part of the source's numbers that would be quantized."""
        return self.quantized_weights / self.weights

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return {**asdict(self), "share": self.share}


def estimate_quantize(
    model: str | Path,
    out: Path | str | None = None,
    options: QuantizeOptions | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizeEstimate:
    """What `quantize` with the same arguments would do, planned from headers alone.

    Raises what quantizing would raise before reading any weight, but for a full disk.
    """
    progress = progress or Progress()
    options = chosen(QuantizeOptions.of, options, settings)
    model, out = str(model), default_output(model, options) if out is None else Path(out)
    options = for_process(options, Ranks())
    seen = _look(model, out, options, revision, progress)
    load_kernels(options.spec, progress, device=options.device, threads=options.threads)
    progress.stage("measuring")
    rate = measure_rate(options)
    plan, found, cost = seen.plan, seen.found, seen.cost
    return QuantizeEstimate(
        model=model,
        out=str(out),
        decided_by=plan.decided_by,
        bytes_in=plan.bytes_in,
        bytes_out=plan.folder.bytes_out,
        disk_needed=plan.bytes_needed - (found.nbytes if found else 0) + (cost.disk if cost else 0),
        disk_free=free_bytes(out),
        shards=len(plan.folder.shards),
        tensors=len(plan.folder.tensors),
        quantized_tensors=len(plan.quantized),
        weights=plan.weights,
        quantized_weights=plan.quantized_weights,
        bits_per_weight=plan.bits_per_weight,
        rate=rate,
        seconds=_left(plan, found) / rate * (3 if cost else 1) + (cost.seconds if cost else 0),
        kept=plan.kept,
        finished=len(found.shards) if found else 0,
        fetched=seen.fetched,
        fetched_to=seen.fetched_to,
        source_format=seen.source_format,
        calibration=cost,
        importance=seen.importance,
        frontier=seen.frontier,
    )


@dataclass(frozen=True)
class _Seen:
    """What the headers of a source, and what lies in the place of the output, tell of a run.

    `found` is what a stopped run has left, None where that is not known.
    """

    plan: QuantizePlan
    found: FinishedShards | None
    cost: CalibrationCost | None
    importance: Mapping[str, Any] | None
    frontier: tuple[Point, ...]
    fetched: int
    fetched_to: str | None
    source_format: str


def _look(
    model: str, out: Path, options: QuantizeOptions, revision: str | None, progress: Progress
) -> _Seen:
    check_output_folder(model, out, options)
    file = find_importance(options)
    checkpoint = open_quantize_source(model, revision, options)
    with ExitStack() as stack:
        stack.callback(checkpoint.fetcher.close, done=False)  # what a stopped run has left stays
        progress.stage("planning")
        plan = plan_quantize(checkpoint, options)
        for note in plan.notes:
            progress.note(note)
        weighing = plan_importance(file, plan, progress)
        if options.computes_first:
            refuse_early(plan, model, out, options, weighing)
        points: tuple[Point, ...] = ()
        if options.target is not None:
            plan, points = target_frontier(plan, model, out, options, weighing, progress)
        cost = _calibration_cost(plan, options, progress)
        job = quantize_job(plan, model, out, options, weighing=weighing)
        # What a calibrated run has left is told by the result of calibrating, which is not known.
        found = scan_finished(job) if cost is None else None
        tensors = (tensor.info for shard in _missing(plan, found) for tensor in shard.tensors)
        folder, fetched = checkpoint.fetcher.room(checkpoint.read_order(tensors).groups)
    return _Seen(
        plan,
        found,
        cost,
        None if weighing is None else weighing.record,
        points,
        fetched,
        str(folder) if fetched else None,
        stored_as(job.identity.source),
    )


def _calibration_cost(
    plan: QuantizePlan, options: QuantizeOptions, progress: Progress
) -> CalibrationCost | None:
    """What calibrating would take; None where nothing is calibrated. No text is sampled."""
    planned = plan_calibration(plan, options, progress, sample=False)
    if planned is None or planned.windows is None:
        return None
    return estimate_calibration(planned.model, planned.layers, planned.windows)


def _left(plan: QuantizePlan, found: FinishedShards | None) -> int:
    """Weights to quantize that are not in a finished shard."""
    missing = _missing(plan, found)
    return sum(t.info.numel for shard in missing for t in shard.tensors if t.spec is not None)


def _missing(plan: QuantizePlan, found: FinishedShards | None) -> list[PlannedShard[TensorPlan]]:
    there = found.shards if found else {}
    return [shard for shard in plan.folder.shards if shard.name not in there]


def measure_rate(options: QuantizeOptions) -> float:
    """Weights a second of the search with these options on this machine."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(_SAMPLE, generator=generator).to(options.device)
    begun = time.perf_counter()
    weights = None if options.importance is None else torch.ones(_SAMPLE[1])
    quantize_tensor(sample, options.spec, importance=weights, threads=options.threads)
    return sample.numel() / (time.perf_counter() - begun)
