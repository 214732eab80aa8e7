"""Small problems for tests of the solver, and what a solution is worth in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.importance import column_shares
from irq_convert.core.packing import unpack_codes
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.solver.moments import factorize
from irq_convert.core.solver.options import SolverOptions
from irq_convert.core.solver.solve import MatrixSolver
from irq_convert.core.spec import QuantSpec
from irq_convert.core.tensor_stats import TensorStats


@dataclass(frozen=True)
class Problem:
    """Weights, what they are to be near to, and second moments of their inputs, all float32."""

    weight: torch.Tensor
    target: torch.Tensor
    moments: torch.Tensor

    def loss(self, q: QuantizedTensor) -> torch.Tensor:
        """`(w - q) H (w - q)^T` of each row, float64."""
        wrong = (dequantize_tensor(q) - self.target).double()
        return ((wrong @ self.moments.double()) * wrong).sum(1)


def problem(rows: int, cols: int, seed: int = 0, inputs: int | None = None) -> Problem:
    """Inputs with a few strong directions and channels, as layers see them."""
    rng = torch.Generator().manual_seed(seed)
    many = inputs or 3 * cols + 5
    mixed = torch.randn(many, cols, generator=rng)
    mixed = mixed + 2 * torch.randn(many, 2, generator=rng) @ torch.randn(2, cols, generator=rng)
    mixed = mixed * torch.exp(0.7 * torch.randn(cols, generator=rng))
    weight = 0.02 * torch.randn(rows, cols, generator=rng)
    target = weight + 0.001 * torch.randn(rows, cols, generator=rng)
    moments = (mixed.double().T @ mixed.double()).float()
    return Problem(weight, target, moments)


def codes_of(q: QuantizedTensor, spec: QuantSpec) -> torch.Tensor:
    return unpack_codes(q.codes, spec.bits, q.cols)


def solve_matrix(
    weight: torch.Tensor,
    target: torch.Tensor,
    moments: torch.Tensor,
    spec: QuantSpec,
    options: SolverOptions | None = None,
    *,
    threads: int | None = None,
    name: str = "weight",
    backend: str = "auto",
) -> tuple[QuantizedTensor, TensorStats]:
    """Quantize `target`, float32 `[rows, cols]`, for inputs with second moments `moments`.

    `weight` are the original weights, of which scale and tau are found; statistics speak of them.
    `moments`: H, float32 `[cols, cols]`, symmetric. All lie on one device. Raises `IrqError`
    naming the tensor for weights or moments that are not finite.
    """
    options = options or SolverOptions()
    diagonal = moments.diagonal().double().cpu().numpy()
    shares = column_shares(diagonal, len(weight), spec.block_size, name)
    solver = MatrixSolver(weight, spec, shares, threads=threads, name=name, backend=backend)
    solver.solve(0, target, moments, factorize(moments, options.damping, name), options)
    return solver.result()
