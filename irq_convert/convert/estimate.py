"""What a conversion would write and cost, without writing anything."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from irq_convert.checkpoint.system import free_bytes
from irq_convert.convert.options import ConvertOptions
from irq_convert.convert.plan import make_plan
from irq_convert.convert.progress import Progress
from irq_convert.convert.run import check_target, compile_kernels, open_source
from irq_convert.core.quantize import quantize_tensor

_SAMPLE = (256, 4096)


@dataclass(frozen=True)
class Estimate:
    """`bytes_out` is exact, without the manifest; `seconds` comes from `rate`, measured here.

    `rate` is in weights a second, for the search alone; reading and writing overlap with it.
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
    check_target(model, out, options)
    checkpoint = open_source(model, revision, headers_only=True)
    progress.stage("planning")
    plan = make_plan(checkpoint, options)
    compile_kernels(options, progress)
    progress.stage("measuring")
    rate = measure_rate(options)
    return Estimate(
        model=model,
        out=str(out),
        decided_by=plan.decided_by,
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
        disk_needed=plan.bytes_needed,
        disk_free=free_bytes(out),
        shards=len(plan.shards),
        tensors=len(plan.tensors),
        quantized_tensors=len(plan.quantized),
        weights=plan.weights,
        quantized_weights=plan.quantized_weights,
        bits_per_weight=plan.bits_per_weight,
        rate=rate,
        seconds=plan.quantized_weights / rate,
    )


def measure_rate(options: ConvertOptions) -> float:
    """Weights a second of the search with these options on this machine."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(_SAMPLE, generator=generator).to(options.device)
    begun = time.perf_counter()
    quantize_tensor(sample, options.spec, threads=options.threads)
    return sample.numel() / (time.perf_counter() - begun)
