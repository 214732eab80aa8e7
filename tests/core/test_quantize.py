"""quantize_tensor: the kernel against torch, against an independent brute force, and its edges."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core.blocks import BlockShape
from irq_convert.core.codebook import CODEBOOKS, get_codebook
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.packing import unpack_codes
from irq_convert.core.quantize import quantize_tensor, quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.search_plan import NF_RADIUS, entropy_table
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError, UsageError

KINDS = ("gauss", "student", "equal", "constant", "zero", "outlier", "offset", "tiny", "huge",
         "scales", "negative zero", "far")  # fmt: skip


def make(kind: str, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Weights of one kind, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * 0.02
    if kind == "student":
        chi = sum(torch.randn(rows, cols, generator=generator) ** 2 for _ in range(3))
        x = x / (chi / 3).sqrt()
    elif kind == "equal":
        x = (x * 50).round() / 50
    elif kind == "constant":
        x[::3], x[1::5] = 0.3, 0.0
    elif kind == "zero":
        x = torch.zeros(rows, cols)
    elif kind == "outlier":
        x[0, 0], x[rows // 2, cols // 2] = 50.0, -300.0
    elif kind == "far":  # beside these the rest of their group is next to nothing
        x[0, 0], x[rows // 2, cols // 2] = -(10.0 ** (seed % 33 + 3)), 10.0 ** (seed % 17 + 3)
        x *= 1e-4
    elif kind in ("offset", "tiny", "huge"):
        x = {"offset": x + 5, "tiny": x * 1e-36, "huge": x * 1e35}[kind]
    elif kind == "scales":
        x = x * torch.exp(torch.randn(rows, 1, generator=generator) * 5)
    elif kind == "negative zero":
        x = torch.where(torch.rand(rows, cols, generator=generator) < 0.5, -0.0, x)
    return x


def same_bytes(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    left, right = a.parts(), b.parts()
    return left.keys() == right.keys() and all(
        left[k].numpy().tobytes() == right[k].numpy().tobytes() for k in left
    )


specs = st.builds(
    QuantSpec,
    codebook=st.sampled_from(sorted(CODEBOOKS)),
    block_size=st.sampled_from([16, 64, 256]),
    objective=st.sampled_from(["none", "entropy", "mse"]),
    refine=st.sampled_from([0, 3]),
)


@settings(max_examples=60)
@given(specs, st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 200), st.integers(0, 99))
def test_kernel_and_torch_give_the_same_bytes(
    spec: QuantSpec, kind: str, rows: int, cols: int, seed: int
) -> None:
    weight = make(kind, rows, cols, seed)
    ours, stats = quantize_with_stats(weight, spec, backend="numba")
    theirs, expected = quantize_with_stats(weight, spec, backend="torch")
    assert same_bytes(ours, theirs)
    assert (stats.plain, stats.stored) == (expected.plain, expected.stored)
    assert (stats.energies == expected.energies).all()
    assert all(
        bool(torch.isfinite(p).all()) for p in ours.parts().values() if p.is_floating_point()
    )


@settings(max_examples=25)
@given(specs, st.integers(1, 300), st.integers(1, 30))
def test_tiles_and_threads_change_no_byte(spec: QuantSpec, cols: int, tiles: int) -> None:
    step = BlockShape(1, cols, spec.block_size, spec.bits).row_multiple
    rows = min(step * tiles, 600)
    weight = make("gauss", rows, cols)
    whole, stats = quantize_with_stats(weight, spec, threads=1)
    parts = [quantize_with_stats(weight[i : i + step], spec) for i in range(0, rows, step)]
    for suffix, tensor in whole.parts().items():
        assert torch.equal(tensor, torch.cat([p.parts()[suffix] for p, _ in parts])), suffix
    total = parts[0][1]
    for _, more in parts[1:]:
        total = total + more
    assert dataclasses.asdict(total).keys() == dataclasses.asdict(stats).keys()
    assert (total.entropy, total.squared_error) == (stats.entropy, stats.squared_error)


def table_sum(block: np.ndarray, mids: np.ndarray, tau: np.float32, scale: np.float32) -> int:
    """Entropy table sum by direct coding: nothing sorted, nothing incremental."""
    edges = np.float32(tau) + mids * np.float32(scale)
    codes = (block[:, None] >= edges[None, :]).sum(1)
    return int(entropy_table(64)[np.bincount(codes, minlength=len(mids) + 1)].sum())


def test_the_objective_that_is_best_for_the_codebook() -> None:
    """Measured in docs/benchmarks.md; a manifest notes what it became."""
    assert [QuantSpec(f"{kind}3").objective for kind in ("nf", "int")] == ["entropy", "mse"]
    assert QuantSpec("int4", zero_point="integer").objective == "mse"
    assert QuantSpec("int4", objective="entropy").objective == "entropy"


@pytest.mark.slow
@pytest.mark.parametrize("codebook", ["nf2", "nf3", "nf4"])
@pytest.mark.parametrize("kind", ["gauss", "student", "equal", "outlier"])
def test_no_storable_tau_has_more_entropy(codebook: str, kind: str) -> None:
    """Every tau code in the paper's window, each with its nearest scale, tried by brute force."""
    weight = make(kind, 8, 64 * 5)
    found = quantize_tensor(weight, QuantSpec(codebook))
    mids = get_codebook(codebook).midpoint_array()
    t_step, t_off = (np.float32(x) for x in found.tau_grid[0].tolist())
    s_step, s_off = (np.float32(x) for x in found.scale_grid[0].tolist())
    for n, block in enumerate(weight.reshape(-1, 64).numpy()):
        lo, hi, center = block.min(), block.max(), np.sort(block)[31]
        radius = np.float32(NF_RADIUS) * max(hi - center, center - lo)
        best = None
        for code in range(256):
            tau = t_step * (np.float32(code) + t_off)
            if abs(tau - center) > radius * np.float32(1 + 1e-5):
                continue
            at = np.clip(np.rint(max(hi - tau, tau - lo) / s_step) - s_off, 0, 255)
            value = table_sum(block, mids, tau, s_step * (at + s_off))
            best = value if best is None else min(best, value)
        tau = t_step * (np.float32(found.tau.flatten()[n]) + t_off)
        scale = s_step * (np.float32(found.scale.flatten()[n]) + s_off)
        stored = table_sum(block, mids, tau, scale)
        if best is not None:
            assert stored <= best


@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
@pytest.mark.parametrize("objective", ["none", "entropy", "mse"])
def test_statistics_are_those_of_what_is_stored(codebook: str, objective: str) -> None:
    weight = make("gauss", 30, 300)
    found, stats = quantize_with_stats(weight, QuantSpec(codebook, objective=objective))
    error = (dequantize_tensor(found).double() - weight.double()).square().sum()
    assert stats.squared_error == pytest.approx(float(error), rel=1e-4)
    assert stats.energy == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    codes = unpack_codes(found.codes, found.shape.bits, found.cols).numpy()
    total = 0.0
    for row in codes:
        for start in range(0, 300, 64):
            counts = np.bincount(row[start : start + 64])
            p = counts[counts > 0] / counts.sum()
            total -= counts.sum() * float((p * np.log2(p)).sum())
    assert stats.entropy == pytest.approx(total / weight.numel(), abs=1e-5)


@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
def test_objectives_do_what_they_say(codebook: str) -> None:
    weight = make("gauss", 64, 1024)

    def stats(objective: str, refine: int = 0):  # type: ignore[no-untyped-def]
        return quantize_with_stats(weight, QuantSpec(codebook, 64, objective, refine))[1]

    plain, entropy, mse = stats("none"), stats("entropy"), stats("mse")
    assert plain.entropy == pytest.approx(plain.entropy_plain, abs=0.01)
    assert entropy.entropy > plain.entropy + 0.04
    assert mse.squared_error < min(plain.squared_error, entropy.squared_error)
    for objective in ("none", "entropy"):
        first, last = stats(objective, 1), stats(objective, 20)
        assert last.squared_error <= first.squared_error <= stats(objective).squared_error * 1.05
    assert stats("entropy", 20).squared_error < entropy.squared_error


@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
def test_zero_and_constant_blocks_are_exact(codebook: str) -> None:
    weight = make("gauss", 12, 256)
    weight[2, 64:128], weight[5, 0:64], weight[7, 128:192] = 0.0, 0.3, -0.0
    for objective in ("entropy", "mse"):
        dense = dequantize_tensor(quantize_tensor(weight, QuantSpec(codebook, objective=objective)))
        assert bool((dense[2, 64:128] == 0).all())
        assert bool((dense[7, 128:192] == 0).all())
        assert bool((dense[5, 0:64] == weight[5, 0]).all())


def test_sources_of_any_float_dtype() -> None:
    weight = make("gauss", 16, 128)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = weight.to(dtype)
        assert same_bytes(quantize_tensor(cast), quantize_tensor(cast.float()))
    strided = make("gauss", 128, 16).t()
    assert same_bytes(quantize_tensor(strided), quantize_tensor(strided.contiguous()))


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**120, -(2.0**125)])
def test_unusable_weights_are_refused_by_name(backend: str, bad: float) -> None:
    weight = make("gauss", 300, 130)
    weight[299, 129] = bad
    with pytest.raises(IrqError, match=r"layers\.7\.weight \[300, 130\] has") as caught:
        quantize_tensor(weight, backend=backend, name="layers.7.weight")
    assert caught.value.exit_code == 1


def test_wrong_use() -> None:
    for weight in (
        torch.zeros(4),
        torch.zeros(2, 3, 4),
        torch.zeros(0, 4),
        torch.zeros(3, 3).int(),
    ):
        with pytest.raises(UsageError, match="weight"):
            quantize_tensor(weight)
    with pytest.raises(UsageError, match="backend"):
        quantize_tensor(torch.zeros(4, 4), backend="triton")
    for wrong in (
        {"codebook": "nf5"}, {"block_size": 60}, {"objective": "kl"}, {"refine": -1},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            QuantSpec(**wrong)  # type: ignore[arg-type]
