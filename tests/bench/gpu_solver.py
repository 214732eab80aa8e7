"""Weighed searches and solved matrices on a GPU, beside the CPU: tables of `gpu.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.importance import column_shares
from irq_convert.core.packing import unpack_codes
from irq_convert.core.quantize import quantize_tensor, quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.spec import QuantSpec
from tests.bench.gpu_parts import Clock, Row, describe, differing, normal
from tests.core.solver.make import solve_matrix

WEIGHTED = (
    QuantSpec("nf4", 64, "entropy", 2),
    QuantSpec("nf4", 64, "mse"),
    QuantSpec("int3", 64, "mse", 3),
    QuantSpec("int4", 64, "mse", 0, "integer"),
    QuantSpec("int2", 32, "mse", 3, "integer"),
    QuantSpec("nf3", 1024, "mse", 3),
)
SOLVED = (QuantSpec("nf3", 64, "mse"), QuantSpec("int4", 64, "mse", 0, "integer"))


def importance(cols: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).exponential(1.0, cols) ** 3


def weighted(clock: Clock, size: int) -> Iterator[Row]:
    """The same square matrix with and without shares of its columns."""
    weight = normal(size, size, clock.device)
    for spec in WEIGHTED:
        shares = column_shares(importance(size), size, spec.block_size, "weight")
        plain = clock.seconds(lambda: quantize_tensor(weight, spec))  # noqa: B023
        with_them = clock.seconds(
            lambda: quantize_with_stats(weight, spec, shares=shares)  # noqa: B023
        )
        each = [f"{seconds / weight.numel() * 1e9:.3g}" for seconds in (plain, with_them)]
        yield describe(spec), *each, f"{with_them / plain:.2f}"


def same_weighted(device: torch.device, size: tuple[int, int]) -> Iterator[Row]:
    """Bytes of the device against those of the CPU kernels."""
    weight = normal(*size, torch.device("cpu"), 7)
    weight[0, 0], weight[-1, -1] = 3.0, -40.0
    given = importance(size[1])
    for spec in WEIGHTED:
        ours = quantize_tensor(weight.to(device), spec, importance=given)
        theirs = quantize_tensor(weight, spec, importance=given, backend="numba")
        wrong, total = differing(ours, theirs)
        yield describe(spec), f"{wrong:,} of {total:,}"


def solving(clock: Clock, shapes: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """A matrix solved on the device and on the CPU, once each after a small one."""
    for spec in SOLVED:
        for rows, cols in shapes:
            weight = normal(rows, cols, clock.device).float()
            moments = _moments(cols, clock.device)
            here = weight.cpu(), moments.cpu()
            few = weight[:64, :256].contiguous(), moments[:256, :256].contiguous()
            solve_matrix(few[0], few[0], few[1], spec)
            solve_matrix(few[0].cpu(), few[0].cpu(), few[1].cpu(), spec)
            found: list[QuantizedTensor] = []
            seconds = clock.once(
                lambda: found.append(  # noqa: B023
                    solve_matrix(weight, weight, moments, spec)[0]  # noqa: B023
                )
            )
            start = time.perf_counter()
            known, _ = solve_matrix(here[0], here[0], here[1], spec)
            on_cpu = time.perf_counter() - start
            codes, wanted = (unpack_codes(q.codes, spec.bits, cols) for q in (found[0], known))
            off = float((codes.cpu() != wanted).double().mean())
            ratio = _loss(found[0], weight, moments) / _loss(known, *here)
            yield (
                describe(spec), f"{rows} x {cols}", f"{seconds:.3f}", f"{on_cpu:.2f}",
                f"{off:.2e}", f"{ratio:.6f}",
            )  # fmt: skip


def _moments(cols: int, device: torch.device) -> torch.Tensor:
    """Second moments of inputs with a few strong directions."""
    inputs = normal(2 * cols, cols, device, 4).float()
    inputs += normal(2 * cols, 4, device, 5).float() @ normal(4, cols, device, 6).float() * 50
    return inputs.T @ inputs


def _loss(q: QuantizedTensor, weight: torch.Tensor, moments: torch.Tensor) -> float:
    wrong = (dequantize_tensor(q) - weight).double()
    return float(((wrong @ moments.double()) * wrong).sum())
