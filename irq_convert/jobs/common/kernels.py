"""Loading the search's kernels before the clock of a job runs: the first time on a machine, they
are compiled, which takes a minute."""

from __future__ import annotations

import torch

from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.progress import Progress


def load_kernels(
    spec: QuantSpec, progress: Progress, *, device: str = "cpu", threads: int | None = None
) -> None:
    """Quantize one block of zeros as `spec` says."""
    progress.stage("loading kernels (compiled once per machine)")
    nothing = torch.zeros(1, spec.block_size, device=device)
    quantize_tensor(nothing, spec, threads=threads)
