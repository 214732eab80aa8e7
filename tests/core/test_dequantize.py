"""Dequantization: both backends against the formula, bit for bit, in every dtype and layout."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core import codegen

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.dequantize import dequantize_rows, dequantize_tensor
from irq_convert.core.scales import expand_statistic
from irq_convert.core.spec import BLOCK_SIZES
from irq_convert.errors import IrqError, UsageError
from tests.paths import ROOT

from .oracle import random_sample, round_to_bfloat16

BACKENDS = ["numba", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
STORED = ["uint8", "float16", "float32"]

samples = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "rows": st.integers(1, 40),
        "cols": st.integers(1, 300),
        "codebook": st.sampled_from(sorted(CODEBOOKS)),
        "block_size": st.sampled_from(BLOCK_SIZES),
        "scale_dtype": st.sampled_from(STORED),
        "tau_dtype": st.sampled_from(STORED),
        "magnitude": st.sampled_from([1e-30, 0.05, 1e4]),
    }
)


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@settings(max_examples=60)
@given(samples=samples, dtype=st.sampled_from(DTYPES))
def test_backends_give_the_formula_bit_for_bit(samples: dict[str, Any], dtype: torch.dtype) -> None:
    sample = random_sample(**samples)
    wanted = torch.from_numpy(sample.dense).to(dtype)
    for backend in BACKENDS:
        found = dequantize_tensor(sample.q, dtype, backend=backend)
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        assert bits_of(found) == bits_of(wanted), backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_roundings_not_a_fused_multiply_add(backend: str) -> None:
    sample = random_sample(1, 64, 512, "nf4", scale_dtype="float32", tau_dtype="float32")
    found = dequantize_tensor(sample.q, backend=backend).numpy()
    level = np.array(CODEBOOKS["nf4"].levels, np.float32)[sample.codes].astype(np.float64)
    block_of = np.arange(512) // 64
    scale = sample.q.scale.numpy()[:, block_of].astype(np.float64)
    tau = sample.q.tau.numpy()[:, block_of].astype(np.float64)
    fused = (level * scale + tau).astype(np.float32)  # the product is exact in float64
    assert (found != fused).sum() > 1000  # the sample tells the two apart
    np.testing.assert_array_equal(found, sample.dense)


def test_bfloat16_rounds_to_nearest_even() -> None:
    sample = random_sample(2, 8, 100, "nf3")
    found = dequantize_tensor(sample.q, torch.bfloat16, backend="numba").double().numpy()
    wanted = np.vectorize(round_to_bfloat16)(sample.dense.astype(np.float64))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_a_part_of_the_whole(backend: str, dtype: torch.dtype) -> None:
    q = random_sample(3, 37, 172, "int3").q
    whole = dequantize_tensor(q, dtype, backend=backend)
    assert torch.equal(dequantize_rows(q, 5, 19, dtype, backend=backend), whole[5:19])
    assert dequantize_rows(q, 7, 7, dtype, backend=backend).shape == (0, 172)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    sample = random_sample(4, 1301, 1030, "nf4")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wanted = torch.from_numpy(sample.dense).to(dtype)
            assert torch.equal(dequantize_tensor(sample.q, dtype), wanted)
    finally:
        torch.set_num_threads(before)


def test_several_callers_at_once() -> None:
    many = [random_sample(seed, 1100, 1000) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for sample, found in zip(
            many, pool.map(lambda s: dequantize_tensor(s.q), many), strict=True
        ):
            np.testing.assert_array_equal(found.numpy(), sample.dense)


FORK = """
import os, torch
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantized import QuantizedTensor
torch.set_num_threads(2)
ones = torch.ones(2048, 16)
codes = torch.zeros(2048, 512, dtype=torch.uint8)
q = QuantizedTensor(codes, ones, ones, None, None, 1024, "nf4", 64)
before = dequantize_tensor(q)
child = os.fork()
if child == 0:
    after = dequantize_tensor(q)
    os._exit(0 if bytes(after.numpy().data) == bytes(before.numpy().data) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_works_after_a_fork() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=120, check=False)
    assert done.returncode == 0


MACHINE = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from tests.core.oracle import random_sample
from irq_convert.core.decode import decodes, packed_product
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.kernels.lookup import LANES
assert str(LANES) == sys.argv[2], LANES
for codebook in ("nf4", "int3", "nf2"):
    for cols in (1, 15, 16, 33, 100, 257):
        sample = random_sample(cols, 9, cols, codebook, 32)
        for dtype in (torch.float32, torch.bfloat16):
            wanted = torch.from_numpy(sample.dense).to(dtype)
            assert torch.equal(dequantize_tensor(sample.q, dtype, backend="numba"), wanted)
            x = torch.ones(2, cols, dtype=dtype)
            assert not decodes(x, sample.q)
            assert torch.equal(packed_product(x, sample.q), torch.nn.functional.linear(x, wanted))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("features", "lanes"), [("+avx,+avx2", 8), ("", 0)])
def test_machines_with_fewer_instructions(tmp_path: Path, features: str, lanes: int) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the instructions are those of x86")
    if lanes and "+avx2" not in codegen.get_host_cpu_features():
        pytest.skip("this machine has no AVX2")
    own = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", MACHINE, str(ROOT), str(lanes)],
        env={**os.environ, **own, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_and_returned(backend: str) -> None:
    sample = random_sample(5, 10, 90, "nf2", 32)
    out = torch.full((10, 90), torch.nan)
    assert dequantize_tensor(sample.q, backend=backend, out=out) is out
    np.testing.assert_array_equal(out.numpy(), sample.dense)


def test_non_contiguous_parts() -> None:
    sample = random_sample(6, 12, 64)
    q = replace(sample.q, codes=sample.q.codes.t().contiguous().t())
    np.testing.assert_array_equal(dequantize_tensor(q).numpy(), sample.dense)


def test_default_dtype_and_device_do_not_matter() -> None:
    sample = random_sample(7, 12, 64, scale_dtype="float16", tau_dtype="float32")
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            for backend in BACKENDS:
                found = dequantize_tensor(sample.q, backend=backend)
                np.testing.assert_array_equal(found.numpy(), sample.dense)
                dequantize_tensor(sample.q, torch.float16, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)


def test_block_of_zeros() -> None:
    sample = random_sample(8, 4, 64, "nf3", scale_dtype="float32", tau_dtype="float32")
    zero = torch.zeros_like(sample.q.scale)
    q = replace(sample.q, scale=zero, tau=zero)
    for backend in BACKENDS:
        assert not dequantize_tensor(q, backend=backend).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int8}, "cannot dequantize to torch.int8"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"out": torch.empty(3, 3)}, "out is torch.float32"),
        ({"out": torch.empty(64, 12).t()}, "must be contiguous"),
        ({"out": torch.empty(12, 64), "dtype": torch.float16}, "out is torch.float32"),
    ],
)
def test_wrong_use(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dequantize_tensor(random_sample(9, 12, 64).q, **arguments)


def test_parts_that_do_not_fit() -> None:
    q = random_sample(10, 12, 64).q
    with pytest.raises(IrqError, match=r"tensor_tau has shape \[11, 1\].*\[12, 1\]"):
        dequantize_tensor(replace(q, tau=q.tau[:11]))
    for backend in BACKENDS:
        with pytest.raises(IrqError, match="need a float32 grid"):
            dequantize_tensor(replace(q, scale_grid=None), backend=backend)
        with pytest.raises(IrqError, match="take no grid"):
            dequantize_tensor(replace(q, scale=q.scale.float()), backend=backend)


def test_expand_statistic() -> None:
    stored = torch.tensor([[0, 3], [255, 7]], dtype=torch.uint8)
    grid = torch.tensor([[0.5, -2.0]])
    assert expand_statistic(stored, grid).tolist() == [[-1.0, 0.5], [126.5, 2.5]]
    half = torch.tensor([[0.25, 1.5]], dtype=torch.float16)
    found = expand_statistic(half, None)
    assert found.dtype == torch.float32
    assert found.tolist() == [[0.25, 1.5]]
