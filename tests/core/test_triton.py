"""The Triton kernels, as far as a machine without a GPU can tell.

Two processes of their own: one runs the kernels under Triton's interpreter (`triton_cases.py`), one
compiles them for real GPUs and looks at the instructions (`triton_build.py`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from irq_convert.core.backends import resolve_backend
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.triton import support
from irq_convert.errors import UsageError
from tests.paths import ROOT

KERNELS = {
    "prepare", "fit_groups", "search", "refine", "refine_zero_points", "measure", "add_up",
    "emit", "dequantize", "sweep_panel", "descend_panel", "multiply_rows",
}  # fmt: skip
needs_triton = pytest.mark.skipif(not support._installed(), reason="Triton is not installed")


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@needs_triton
@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=")
    files = [f"tests/core/{folder}triton_cases.py" for folder in ("", "solver/")]
    done = run("-m", "pytest", *options, "-v", *files, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    for file, least in zip(files, (40, 10), strict=True):
        assert len(re.findall(rf"^{file}::.* PASSED", done.stdout, re.MULTILINE)) >= least


@needs_triton
@pytest.mark.slow
def test_compiled_kernels_round_every_operation(tmp_path: Path) -> None:
    """No fused multiply-add, nothing approximate, no denormal taken for zero.

    A launch where there is no GPU is a reason in one line.
    """
    pytest.importorskip("triton.backends.nvidia.compiler")
    done = run("-m", "tests.core.triton_build", "80", "90", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {name for name, _, _ in report["kernels"]} == KERNELS
    for name, instructions, assembled in report["kernels"]:
        assert assembled, name
        wrong = [i for i in instructions if re.search(r"^fma|ftz|approx|\.full", i)]
        assert not wrong, (name, wrong)
        divisions = [i for i in instructions if i.startswith(("div", "rcp"))]
        assert all(".rn" in i for i in divisions), (name, divisions)
    assert any(i.startswith("mul.rn.f32") for _, found, _ in report["kernels"] for i in found)
    assert any(i.startswith("fma") for i in report["fused"]), "the check sees nothing"
    assert report["failure"].startswith("Triton does not run here: ")
    assert "\n" not in report["failure"]


def test_who_serves_which_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(support, "_installed", lambda: True)
    cpu, mps, cuda = (torch.device(name) for name in ("cpu", "mps", "cuda"))
    assert resolve_backend("auto", cpu) == "numba"
    assert resolve_backend("auto", mps) == "torch"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert resolve_backend("auto", cuda) == "torch"  # no NVIDIA GPU: ROCm calls its devices cuda
    with pytest.raises(UsageError, match="not serve tensors on mps: the kernels are for NVIDIA"):
        resolve_backend("triton", mps)


@pytest.mark.parametrize(
    ("installed", "capability", "failure", "reason"),
    [
        (True, (8, 0), None, ""),
        (True, (6, 1), None, "older than Triton supports"),
        (False, (8, 0), None, "Triton is not installed"),
        (True, (8, 0), "Triton does not run here: no C compiler", "no C compiler"),
    ],
)
def test_an_nvidia_gpu_has_triton_or_a_reason(
    installed: bool,
    capability: tuple[int, int],
    failure: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(support, "_installed", lambda: installed)
    monkeypatch.setattr(support, "_failure", lambda device: failure)
    cuda = torch.device("cuda", 0)
    if not reason:
        assert resolve_backend("auto", cuda) == "triton"
        return
    with pytest.warns(UserWarning, match=f"cuda:0 is served by plain torch.*{reason}"):
        assert resolve_backend("auto", cuda) == "torch"
    with pytest.raises(UsageError, match=reason):
        resolve_backend("triton", cuda)


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = torch.ones(2, 64)
    with pytest.raises(UsageError, match="triton backend does not serve tensors on cpu"):
        quantize_tensor(weight, backend="triton")
    with pytest.raises(UsageError, match="triton backend does not serve tensors on cpu"):
        dequantize_tensor(quantize_tensor(weight), backend="triton")


@pytest.mark.slow
def test_triton_is_imported_only_when_a_tensor_asks_for_it() -> None:
    rooms = "irq_convert.core.quantize, irq_convert.core.solver.solve, irq_convert.nn.function"
    code = f"import sys, {rooms}\n"
    assert run("-c", code + "sys.exit('triton' in sys.modules)").returncode == 0


@pytest.mark.slow
def test_the_benchmark_refuses_in_one_line_without_a_gpu() -> None:
    done = run("tests/bench/gpu.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: torch sees no CUDA GPU here, so there is nothing to measure\n"
