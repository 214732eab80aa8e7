"""Two processes on the CPU, DDP and FSDP2 under torchrun, against one with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import irq_convert
from irq_convert.artifact.config import ModuleFormat
from irq_convert.nn.linear import IrqLinear
from irq_convert.nn.packed import statistics_parameters
from tests.fresh import Forks
from tests.paths import ROOT

from .helpers import artifact, packed_layers
from .workers import BLOCK, STATISTICS, attached, train

torch_distributed = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="torch was built without gloo"
)


RANKS = """
import os, sys
from pathlib import Path
import torch
from tests.adapters.workers import main
from tests.ranks import agent_store, run_ranks
def run():
    torch.set_num_threads(1)  # a new pool, before two threads ask for one
    main(*map(Path, sys.argv[1:]))
    return 0
store, told = agent_store(2)
os.environ.update(told)
sys.exit(run_ranks(2, run))
"""
"""Two processes as torchrun would start them, with all imports made."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tmp_path_factory.mktemp("distributed") / "base", bias=True)


@pytest.fixture(scope="module")
def found(python: Forks, base: Path) -> dict[str, Any]:
    """What two processes report; one run serves all tests."""
    out = base.parent / "found.pt"
    done = python(RANKS, base, out, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, Any] = torch.load(out)
    assert loaded["world"] == 2
    return loaded


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert set(found["grads"]) == set(wanted["grads"])
    for name, grad in wanted["grads"].items():
        torch.testing.assert_close(found["grads"][name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
@torch_distributed
@pytest.mark.parametrize(
    ("kind", "options", "trained"),
    [
        ("ddp", {}, "lora_iec_beta"),
        ("ddp block", BLOCK, "lora_iec_beta"),
        ("ddp statistics", STATISTICS, "lora_irq_tau"),
        ("fsdp", {}, "lora_iec_beta"),
        ("fsdp statistics", STATISTICS, "lora_irq_scale"),
    ],
)
def test_two_processes_are_one(
    base: Path, found: dict[str, Any], kind: str, options: dict[str, Any], trained: str
) -> None:
    wanted = train(attached(base, **options))
    assert wanted["losses"][0] != wanted["losses"][1]
    assert any(trained in name for name in wanted["grads"])
    assert_same(found[kind], wanted)


@pytest.mark.slow
@torch_distributed
def test_packed_parts_are_sharded_as_they_are(found: dict[str, Any]) -> None:
    assert found["fsdp parts"] == {
        "weight": (True, torch.uint8),
        "weight_scale": (True, torch.uint8),
        "weight_tau": (True, torch.uint8),
        "weight_scale_grid": (True, torch.float32),
        "weight_tau_grid": (True, torch.float32),
    }


@pytest.mark.slow
@torch_distributed
def test_mixed_precision_leaves_the_statistics_alone(base: Path, found: dict[str, Any]) -> None:
    assert found["mixed parts"]["weight"] == (True, torch.uint8)
    assert found["mixed parts"]["weight_tau_grid"] == (False, torch.float32)
    wanted = train(attached(base))
    assert found["mixed"]["losses"] == pytest.approx(wanted["losses"], rel=0.02)
    assert found["mixed"]["losses"] != wanted["losses"]
    # Each rounds differently; all gradients together point the same way.
    near, ours = (
        torch.cat([grads[name].flatten() for name in wanted["grads"]])
        for grads in (wanted["grads"], found["mixed"]["grads"])
    )
    assert torch.nn.functional.cosine_similarity(near, ours, dim=0) > 0.95


@pytest.mark.slow
@torch_distributed
def test_mixed_precision_without_ignoring_them_is_refused(found: dict[str, Any]) -> None:
    assert "need a float32 grid" in found["unignored"]


def test_statistics_parameters(base: Path) -> None:
    model = irq_convert.load(base)
    parts = statistics_parameters(model)
    layers = packed_layers(model).values()
    assert parts == {
        p for m in layers for p in (m.weight_scale_grid, m.weight_tau_grid) if p is not None
    }
    assert len(parts) == 28
    wide = nn.Sequential(IrqLinear(64, 4, ModuleFormat("nf4", 64, "float16", "float32")))
    assert statistics_parameters(wide) == {wide[0].weight_scale, wide[0].weight_tau}
    assert statistics_parameters(nn.Linear(2, 2)) == set()
