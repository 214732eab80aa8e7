"""What the benchmarks on a GPU share: a clock that waits for the device, and weights to measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.spec import QuantSpec

Row = tuple[str, ...]


class Clock:
    """Seconds of a call, waiting for the device before and after it."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of some rounds after one that is not counted."""
        call()
        return statistics.median(self.once(call) for _ in range(self.rounds))

    def once(self, call: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def describe(spec: QuantSpec) -> str:
    parts = [spec.codebook, f"B{spec.block_size}", spec.objective]
    parts += [f"refine {spec.refine}"] if spec.refine else []
    parts += ["integer zero"] if spec.zero_point == "integer" else []
    return " ".join(parts)


def normal(rows: int, cols: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(rows, cols, generator=generator, device=device) * 0.02).bfloat16()


def stored_bytes(q: QuantizedTensor) -> int:
    return sum(part.nbytes for part in q.parts().values())


def differing(ours: QuantizedTensor, theirs: QuantizedTensor) -> tuple[int, int]:
    """How many stored bytes of the device are not those of the CPU, and of how many."""
    parts, known = ours.parts(), theirs.parts()
    wrong = sum(
        int((parts[k].cpu().view(torch.uint8) != known[k].view(torch.uint8)).sum()) for k in known
    )
    return wrong, sum(part.nbytes for part in known.values())
