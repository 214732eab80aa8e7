"""Integer zero points: kernel against torch, against brute force over the finite set, and edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from irq_convert.artifact.contents import open_artifact
from irq_convert.artifact.verify import verify_artifact
from irq_convert.core.blocks import BlockShape
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor, quantize_with_stats
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.search_plan import ZERO_POINT_SCALES
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import UsageError
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import open_source, quantize

from .test_quantize import KINDS, make, same_bytes

F32 = np.float32
specs = st.builds(
    QuantSpec,
    codebook=st.sampled_from(["int2", "int3", "int4"]),
    block_size=st.sampled_from([16, 64]),
    objective=st.sampled_from(["none", "entropy", "mse"]),
    refine=st.sampled_from([0, 3]),
    zero_point=st.just("integer"),
)


def zero_points(q: QuantizedTensor, spec: QuantSpec) -> np.ndarray:
    """The zero point of every block by the definition; fails where tau is no level's."""
    levels = spec.book.level_array()
    scale = expand_statistic(q.scale, q.scale_grid).numpy()
    tau = q.tau.numpy()
    made = F32(0) - levels[:, None, None] * scale[None]
    hit = made == tau[None]
    assert hit.any(0).all()
    return hit.argmax(0)


@settings(max_examples=30)
@given(specs, st.sampled_from(KINDS), st.integers(1, 20), st.integers(1, 150), st.integers(0, 99))
def test_kernel_and_torch_give_the_same_bytes(
    spec: QuantSpec, kind: str, rows: int, cols: int, seed: int
) -> None:
    weight = make(kind, rows, cols, seed)
    ours, stats = quantize_with_stats(weight, spec, backend="numba")
    theirs, expected = quantize_with_stats(weight, spec, backend="torch")
    assert same_bytes(ours, theirs)
    assert (stats.plain, stats.stored) == (expected.plain, expected.stored)
    assert (stats.energies == expected.energies).all()
    assert ours.tau.dtype == torch.float32
    assert ours.tau_grid is None
    zero_points(ours, spec)


def candidates(block: np.ndarray, grid: np.ndarray, spec: QuantSpec) -> list[tuple[int, F32]]:
    """Every (zero point, scale) that the search may take, from the definition."""
    levels = spec.book.level_array()
    top = len(levels) - 1
    low, high = min(block.min(), F32(0)), max(block.max(), F32(0))

    def fits(z: int) -> F32:
        down = F32(0) if low == 0 else (F32(np.inf) if z == 0 else -low / (F32(1) + levels[z]))
        up = F32(0) if high == 0 else (F32(np.inf) if z == top else high / (F32(1) - levels[z]))
        return max(down, up)

    fitting = min(range(top + 1), key=lambda z: (fits(z), z))
    widest, narrowest = (F32(f) for f in ZERO_POINT_SCALES[spec.objective])
    step, offset = grid

    def code(value: F32) -> int:
        return int(np.clip(np.rint(value * (F32(1) / step)) - offset, 0, 255))

    scales = range(code(fits(fitting) * narrowest), code(fits(fitting) * widest) + 1)
    around = [z for z in (fitting, fitting - 1, fitting + 1) if 0 <= z <= top]
    if spec.objective == "none":
        around = around[:1]
    return [(z, step * (F32(c) + offset)) for z in around for c in scales]


def codes_of(block: np.ndarray, z: int, scale: F32, spec: QuantSpec) -> np.ndarray:
    tau = F32(0) - spec.book.level_array()[z] * scale
    edges = tau + spec.book.midpoint_array() * scale
    return (block[:, None] >= edges[None]).sum(1)


def entropy(codes: np.ndarray) -> float:
    share = np.bincount(codes) / len(codes)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def error(block: np.ndarray, z: int, scale: F32, spec: QuantSpec) -> float:
    levels = spec.book.level_array().astype(np.float64)
    values = (levels[codes_of(block, z, scale, spec)] - levels[z]) * float(scale)
    return float(((values - block.astype(np.float64)) ** 2).sum())


@pytest.mark.parametrize("codebook", ["int2", "int3", "int4"])
@pytest.mark.parametrize("objective", ["none", "entropy", "mse"])
def test_nothing_in_the_finite_set_is_better(codebook: str, objective: str) -> None:
    spec = QuantSpec(codebook, 32, objective, 0, "integer")
    weight = make("gauss", 6, 96, 5) + 0.01 * make("student", 6, 96, 6)
    q = quantize_tensor(weight, spec)
    chosen, scale = zero_points(q, spec), expand_statistic(q.scale, q.scale_grid).numpy()
    assert q.scale_grid is not None
    for at in range(18):
        row, col = divmod(at, 3)
        block = weight[row, 32 * col : 32 * col + 32].numpy()
        mine = int(chosen[row, col]), scale[row, col]
        listed = candidates(block, q.scale_grid[0].numpy(), spec)
        assert mine in listed
        if objective == "entropy":
            best = max(entropy(codes_of(block, z, s, spec)) for z, s in listed)
            assert entropy(codes_of(block, *mine, spec)) == pytest.approx(best, abs=1e-6)
        else:
            best = min(error(block, z, s, spec) for z, s in listed)
            assert error(block, *mine, spec) <= best * (1 + 1e-4)


@pytest.mark.parametrize("objective", ["none", "entropy"])
def test_refining_lowers_the_error(objective: str) -> None:
    weight = make("student", 16, 128, 3)
    plain = QuantSpec("int3", 64, objective, 0, "integer")
    refined = QuantSpec("int3", 64, objective, 10, "integer")
    before = quantize_with_stats(weight, plain)[1].squared_error
    after = quantize_with_stats(weight, refined)[1].squared_error
    assert after < before


def test_one_sided_constant_and_zero_blocks() -> None:
    weight = torch.zeros(5, 64)
    weight[1] = 0.75
    weight[2] = torch.linspace(0.1, 0.3, 64)
    weight[3] = -weight[2]
    for codebook in ("int2", "int3", "int4"):
        spec = QuantSpec(codebook, 64, "none", 0, "integer")
        q = quantize_tensor(weight, spec)
        dense, zeros = dequantize_tensor(q), zero_points(q, spec)[:, 0]
        assert not dense[0].any()
        assert (dense[1] == 0.75).all()
        assert zeros[2] == 0
        assert zeros[3] == len(spec.book.levels) - 1
        assert (dense[2] >= 0).all()
        assert torch.equal(dense[2], -dense[3].flip(0)[torch.arange(63, -1, -1)])


def test_zero_is_a_value_of_every_block() -> None:
    spec = QuantSpec("int4", 64, "mse", 2, "integer")
    q = quantize_tensor(make("offset", 4, 128, 1) - 5, spec)
    levels = torch.from_numpy(spec.book.level_array())
    zeros = torch.from_numpy(zero_points(q, spec))
    scale = expand_statistic(q.scale, q.scale_grid)
    assert not (levels[zeros] * scale + q.tau).any()


def test_normal_float_is_refused() -> None:
    with pytest.raises(UsageError, match="uniform levels"):
        QuantSpec("nf4", zero_point="integer")
    with pytest.raises(UsageError, match="unknown zero point"):
        QuantSpec("int4", zero_point="half")


def test_the_whole_way(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    weight = make("gauss", 40, 100, 2)
    save_file({"layers.0.up.weight": weight}, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text('{"model_type": "unknown"}')
    spec = QuantSpec("int4", 32, "entropy", 0, "integer")
    quantize(str(source), out, QuantizeOptions(spec, tile_weights=1))
    assert not verify_artifact(out, against=open_source(str(source))).failures
    (stored,) = open_artifact(out).quantized
    assert stored.format.tau_dtype == "float32"
    assert stored.shape == BlockShape(40, 100, 32, 4)
