"""What a conversion would write and cost, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from irq_convert.checkpoint.locate import Fetch, open_source
from irq_convert.checkpoint.system import free_bytes
from irq_convert.convert.options import ConvertOptions
from irq_convert.convert.plan import ConversionPlan, ShardPlan, make_plan
from irq_convert.convert.resume import conversion_job
from irq_convert.convert.run import check_target, compile_kernels, for_process
from irq_convert.core.quantize import quantize_tensor
from irq_convert.jobs.progress import Progress
from irq_convert.jobs.ranks import Ranks
from irq_convert.jobs.resume import Found
from irq_convert.jobs.run import look

_SAMPLE = (256, 4096)


@dataclass(frozen=True)
class Estimate:
    """`bytes_out` is exact, without the manifest; `seconds` comes from `rate`, measured here.

    `rate` is in weights a second, for the search alone; reading and writing overlap with it.
    `kept` counts the numbers that would be copied, by the reason. `finished` of the `shards` are
    there already and would be used; `disk_needed` is for the others. `fetched` is the most that the
    source's files take in `fetched_to` when they come from the Hub, beside `disk_needed`.
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

    @property
    def share(self) -> float:
        """Part of the source's numbers that would be quantized."""
        return self.quantized_weights / self.weights

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return {**asdict(self), "share": self.share}


def estimate(
    model: str,
    out: Path,
    options: ConvertOptions,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Plan the conversion of `model` into `out` from headers alone.

    Raises what the conversion would raise before reading any weight, but for a full disk.
    """
    progress = progress or Progress()
    options = for_process(options, Ranks())
    check_target(model, out, options)
    checkpoint = open_source(model, revision, Fetch.STREAM if options.stream else Fetch.AS_READ)
    with ExitStack() as stack:
        stack.callback(checkpoint.supply.close, done=False)  # what a stopped run has left stays
        progress.stage("planning")
        plan = make_plan(checkpoint, options)
        sizes = plan.bytes_in, plan.bytes_out, plan.bytes_needed
        found = look(conversion_job(plan, model, out, options))
        tensors = (tensor.info for shard in _missing(plan, found) for tensor in shard.tensors)
        fetched_to, fetched = checkpoint.supply.room(checkpoint.feed(tensors).order)
    compile_kernels(options, progress)
    progress.stage("measuring")
    rate = measure_rate(options)
    return Estimate(
        model=model,
        out=str(out),
        decided_by=plan.decided_by,
        bytes_in=sizes[0],
        bytes_out=sizes[1],
        disk_needed=sizes[2] - (found.nbytes if found else 0),
        disk_free=free_bytes(out),
        shards=len(plan.shards),
        tensors=len(plan.tensors),
        quantized_tensors=len(plan.quantized),
        weights=plan.weights,
        quantized_weights=plan.quantized_weights,
        bits_per_weight=plan.bits_per_weight,
        rate=rate,
        seconds=_left(plan, found) / rate,
        kept=plan.kept,
        finished=len(found.shards) if found else 0,
        fetched=fetched,
        fetched_to=str(fetched_to) if fetched else None,
    )


def _left(plan: ConversionPlan, found: Found | None) -> int:
    """Weights to quantize that are not in a finished shard."""
    missing = _missing(plan, found)
    return sum(t.info.numel for shard in missing for t in shard.tensors if t.spec is not None)


def _missing(plan: ConversionPlan, found: Found | None) -> list[ShardPlan]:
    there = found.shards if found else {}
    return [shard for shard in plan.shards if shard.name not in there]


def measure_rate(options: ConvertOptions) -> float:
    """Weights a second of the search with these options on this machine."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(_SAMPLE, generator=generator).to(options.device)
    begun = time.perf_counter()
    quantize_tensor(sample, options.spec, threads=options.threads)
    return sample.numel() / (time.perf_counter() - begun)
