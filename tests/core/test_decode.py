"""The packed product: against float64, whatever the layout, the tokens and the threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irq_convert.core import decode_cpu, product, working_dtype
from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.decode import (
    MOST_TOKENS,
    MOST_TOKENS_THROUGH_FLOAT32,
    decodes,
    packed_product,
)
from irq_convert.core.kernels.decode_input import WORD_LEVEL
from irq_convert.core.product import tiled_product
from irq_convert.core.quantized import QuantizedTensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.spec import BLOCK_SIZES
from irq_convert.errors import IrqError, UsageError

from .oracle import Sample, random_sample

SHORT = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *SHORT]
STORED = ["uint8", "float16", "float32"]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half the distance of a number of a dtype to the next, at most, relative to it."""

needs_kernels = pytest.mark.skipif(not decode_cpu.usable(), reason="the machine has no AVX2")


def inputs(seed: int, tokens: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers with one that towers above the rest, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, cols, generator=generator)
    x[:, seed % cols] *= 30
    return x.to(dtype)


def exact(x: torch.Tensor, sample: Sample) -> torch.Tensor:
    return x.double() @ torch.from_numpy(sample.dense).double().T


def allowed(x: torch.Tensor, sample: Sample, found: torch.Tensor) -> torch.Tensor:
    """What may be lost by levels and inputs in fixed point, by sums in float32, and at the end."""
    block_of = np.arange(x.shape[1]) // sample.q.block_size
    scale = expand_statistic(sample.q.scale, sample.q.scale_grid)[:, block_of].double()
    tau = expand_statistic(sample.q.tau, sample.q.tau_grid)[:, block_of].double()
    size = x.double().abs()
    lost = 1e-6 * (size @ (scale + tau.abs()).T) + 1e-37
    if x.dtype == torch.bfloat16:
        runs = torch.nn.functional.pad(size, (0, -x.shape[1] % 64)).view(len(x), -1, 64)
        unit = (runs.amax(2, keepdim=True) / 32767).expand_as(runs).flatten(1)[:, : x.shape[1]]
        lost += size @ (scale / 2 / WORD_LEVEL).T + (unit / 2) @ scale.T
    tiny = 2.0**-25 if x.dtype == torch.float16 else 0.0
    return 1.01 * (lost + UNIT[x.dtype] * (found.double().abs() + lost) + tiny)


samples = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "rows": st.integers(1, 24),
        "cols": st.integers(1, 300),
        "codebook": st.sampled_from(sorted(CODEBOOKS)),
        "block_size": st.sampled_from(BLOCK_SIZES),
        "scale_dtype": st.sampled_from(STORED),
        "tau_dtype": st.sampled_from(STORED),
        "magnitude": st.sampled_from([1e-3, 0.05, 1e2]),
    }
)


@needs_kernels
@settings(max_examples=60)
@given(samples=samples, dtype=st.sampled_from(DTYPES), tokens=st.integers(1, 8))
def test_against_a_float64_product(
    samples: dict[str, Any], dtype: torch.dtype, tokens: int
) -> None:
    sample = random_sample(**samples)
    x = inputs(samples["seed"] % 1000, tokens, samples["cols"], dtype)
    assert decodes(x, sample.q)
    found = packed_product(x, sample.q)
    assert (found.dtype, found.shape) == (dtype, (tokens, samples["rows"]))
    assert bool(((found.double() - exact(x, sample)).abs() <= allowed(x, sample, found)).all())
    # A token's numbers do not depend on those beside it.
    alone = torch.cat([packed_product(row[None], sample.q) for row in x])
    assert torch.equal(found, alone)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", sorted(CODEBOOKS))
def test_nearer_to_the_exact_product_than_a_dense_layer(codebook: str, dtype: torch.dtype) -> None:
    sample = random_sample(3, 400, 1000, codebook)
    x = inputs(5, 4, 1000, dtype)
    wanted = exact(x, sample)
    ours, dense = (f(x, sample.q).double() - wanted for f in (packed_product, tiled_product))
    # In float32 both are at the last place, and the order of a sum decides.
    slack = 2.0 if dtype == torch.float32 else 1.0
    assert ours.square().mean() <= slack**2 * dense.square().mean()


@needs_kernels
def test_no_dense_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> torch.Tensor:
        raise AssertionError("dequantized")

    monkeypatch.setattr(product, "dequantize_rows", refuse)
    monkeypatch.setattr(product, "dequantize_tensor", refuse)
    q = random_sample(0, 20, 100).q
    packed_product(torch.randn(MOST_TOKENS[torch.float32], 100), q)
    with pytest.raises(AssertionError, match="dequantized"):
        packed_product(torch.randn(MOST_TOKENS[torch.float32] + 1, 100), q)
    with pytest.raises(AssertionError, match="dequantized"):
        packed_product(torch.randn(1, 100, dtype=torch.float64), q)


@needs_kernels
def test_more_tokens_where_tiles_go_through_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_sample(0, 20, 100).q
    most = {True: MOST_TOKENS[torch.bfloat16], False: MOST_TOKENS_THROUGH_FLOAT32}
    for able, tokens in most.items():
        monkeypatch.setattr(working_dtype, "cpu_multiplies", lambda dtype, able=able: able)
        for dtype in SHORT:
            own = tokens if dtype == torch.bfloat16 else MOST_TOKENS[dtype]
            assert decodes(torch.empty(own, 100, dtype=dtype), q)
            assert not decodes(torch.empty(own + 1, 100, dtype=dtype), q)


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cpu, "SHARED_WEIGHTS", 0)
    q = random_sample(4, 301, 530, "nf3").q
    x = inputs(6, 3, 530, torch.bfloat16)
    monkeypatch.setattr(decode_cpu.PACE, "shares", lambda: True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = packed_product(x, q)
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(packed_product(x, q), wanted)
    finally:
        torch.set_num_threads(before)


class Pool:
    """Runs jobs when it likes: at once, or when it is told to."""

    def __init__(self, at_once: bool) -> None:
        self.at_once, self.jobs = at_once, list[Any]()

    def submit(self, job: Any, *args: Any) -> None:
        self.jobs.append(partial(job, *args))
        if self.at_once:
            self.jobs.pop()()


@needs_kernels
@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("at_once", [True, False])
def test_threads_that_do_all_or_nothing(
    at_once: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that never runs is not waited for; where one has done all, no row is computed again."""
    q, x = random_sample(16, 150, 128).q, inputs(17, 2, 128, torch.bfloat16)
    wanted = packed_product(x, q)
    pool, real, rows = Pool(at_once), decode_cpu._multiply, list[int]()

    def multiply(plan: Any, settings: Any, begin: int, *more: Any) -> int:
        row = real(plan, settings, begin, *more)
        rows.append(row - begin if more[-1] else 0)
        return row

    monkeypatch.setattr(decode_cpu, "SHARED_WEIGHTS", 0)
    monkeypatch.setattr(decode_cpu, "_multiply", multiply)
    monkeypatch.setattr(decode_cpu.PACE, "shares", lambda: True)
    monkeypatch.setattr(decode_cpu, "thread_pool", lambda *_: pool)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = packed_product(x, q)
    assert torch.equal(found, wanted)
    assert sum(rows) == (0 if at_once else 150)
    x[:] = 7.0  # what late ones write is nobody's
    for job in pool.jobs:
        job()
    assert torch.equal(found, wanted)


def test_the_faster_of_one_thread_and_several_is_kept_and_the_other_tried() -> None:
    pace = decode_cpu.Pace()
    for cost in ({True: 3.0, False: 1.0}, {True: 0.5, False: 1.0}):  # the machine changes
        chosen = []
        for _ in range(24 * decode_cpu.TRY_AGAIN):
            chosen.append(pace.shares())
            pace.saw(chosen[-1], cost[chosen[-1]])
        last = chosen[-2 * decode_cpu.TRY_AGAIN :]
        assert last.count(min(cost, key=lambda way: cost[way])) == len(last) - 2


@needs_kernels
def test_several_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cpu, "SHARED_WEIGHTS", 0)
    many = [(random_sample(seed, 200, 300).q, inputs(seed, 1, 300, DTYPES[0])) for seed in range(6)]
    wanted = [packed_product(x, q) for q, x in many]
    with ThreadPoolExecutor(6) as pool:
        for found, known in zip(
            pool.map(lambda pair: packed_product(pair[1], pair[0]), many), wanted, strict=True
        ):
            assert torch.equal(found, known)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 2, 70), (0, 70), (3, 4, 70)])
def test_shapes_and_bias(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sample = random_sample(8, 33, 70, "int3", 32)
    x = inputs(9, 12, 70, dtype)[: max(1, int(np.prod(shape[:-1])))]
    x = x[:0] if 0 in shape else x
    bias = torch.randn(33).to(dtype)
    found = packed_product(x.view(shape), sample.q, bias)
    assert (found.shape, found.dtype) == ((*shape[:-1], 33), dtype)
    wanted = (exact(x, sample) + bias.double()).view(found.shape)
    torch.testing.assert_close(found.double(), wanted, rtol=4 * UNIT[dtype], atol=1e-2)


@needs_kernels
def test_layouts_that_are_not_contiguous() -> None:
    sample = random_sample(10, 24, 128, "nf4", 32)
    x = inputs(11, 2, 128, torch.float32)
    wanted = packed_product(x, sample.q)
    turned = replace(
        sample.q,
        codes=sample.q.codes.t().contiguous().t(),
        scale=sample.q.scale.t().contiguous().t(),
    )
    assert torch.equal(packed_product(x, turned), wanted)
    assert torch.equal(packed_product(x.t().contiguous().t(), sample.q), wanted)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e30])
def test_inputs_of_any_size(dtype: torch.dtype, size: float) -> None:
    sample = random_sample(12, 9, 130, "nf2", 16)
    x = (torch.randn(2, 130, generator=torch.Generator().manual_seed(1)) * size).to(dtype)
    found = packed_product(x, sample.q).double()
    assert bool(((found - exact(x, sample)).abs() <= allowed(x, sample, found)).all())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_seen(dtype: torch.dtype, bad: float) -> None:
    q = random_sample(13, 9, 130).q
    x = torch.ones(2, 130, dtype=dtype)
    x[1, 77] = bad
    found = packed_product(x, q)
    assert bool(found[0].isfinite().all())
    assert not found[1].isfinite().any()


def _wrong(change: str) -> tuple[torch.Tensor, QuantizedTensor, torch.Tensor | None]:
    q, x = random_sample(14, 12, 64).q, torch.ones(1, 64)
    cases: dict[str, Any] = {
        "cols": (x[:, :63], q, None),
        "integers": (x.int(), q, None),
        "bias": (x, q, torch.ones(11)),
        "bias dtype": (x, q, torch.ones(12, dtype=torch.float64)),
        "device": (x.to("meta"), q, None),
    }
    case: tuple[torch.Tensor, QuantizedTensor, torch.Tensor | None] = cases[change]
    return case


@pytest.mark.parametrize("change", ["cols", "integers", "bias", "bias dtype", "device"])
def test_wrong_use(change: str) -> None:
    with pytest.raises(UsageError, match=r"^(an input of|bias is) torch\.\w+ \["):
        packed_product(*_wrong(change))


def test_parts_that_do_not_fit() -> None:
    q, x = random_sample(15, 12, 64).q, torch.ones(1, 64)
    with pytest.raises(IrqError, match=r"tensor_tau has shape \[11, 1\].*\[12, 1\]"):
        packed_product(x, replace(q, tau=q.tau[:11]))
    with pytest.raises(IrqError, match="need a float32 grid"):
        packed_product(x, replace(q, scale_grid=None))
    with pytest.raises(IrqError, match="take no grid"):
        packed_product(x, replace(q, scale=q.scale.float()))
