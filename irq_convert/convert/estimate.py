"""What a conversion would write and cost, without writing anything."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

from irq_convert.checkpoint.disk import check_output
from irq_convert.checkpoint.system import free_bytes
from irq_convert.convert.options import ConvertOptions
from irq_convert.convert.plan import make_plan
from irq_convert.convert.run import MANIFEST_ROOM, open_source
from irq_convert.core.quantize import quantize_tensor

_SAMPLE = (256, 4096)


@dataclass(frozen=True)
class Estimate:
    """`bytes_out` is exact up to the manifest; `seconds` comes from `rate`, measured here and now.

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
    model: str, out: Path, options: ConvertOptions, *, revision: str | None = None
) -> Estimate:
    """Plan the conversion of `model` into `out` from headers alone.

    Raises what the conversion would raise before reading any weight.
    """
    local = Path(model) if Path(model).exists() else None
    check_output(out, local, options.overwrite)
    checkpoint = open_source(model, revision, headers_only=True)
    plan = make_plan(checkpoint, options)
    rate = measure_rate(options)
    return Estimate(
        model=model,
        out=str(out),
        decided_by=plan.decided_by,
        bytes_in=checkpoint.nbytes,
        bytes_out=plan.bytes_out,
        disk_needed=plan.bytes_out + MANIFEST_ROOM,
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
    import torch

    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(_SAMPLE, generator=generator).to(options.device)
    quantize_tensor(sample[:16], options.spec, threads=options.threads)  # compiles
    begun = time.perf_counter()
    quantize_tensor(sample, options.spec, threads=options.threads)
    return sample.numel() / (time.perf_counter() - begun)
