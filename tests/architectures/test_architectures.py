"""Every architecture of the zoo: quantized, loaded, equal to the dense model, saved, trained."""

from __future__ import annotations

import re

import pytest
import torch

from irq_convert.jobs.quantize.report import little_quantized
from irq_convert.nn.experts import IrqExperts, Separate, Stacked
from irq_convert.nn.linear import IrqLinear

from .journey import TOLERANCE, Result, run
from .zoo import KINDS, Kind

NEVER = re.compile(
    r"(norm|embed|wte|wpe|lm_head|embed_out|router|gate\.weight|shared_expert_gate|bias|sinks)"
)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Result:
    kind: Kind = request.param
    return run(kind, tmp_path_factory.mktemp("kind"))


def test_whole_way(result: Result) -> None:
    assert result.difference <= TOLERANCE
    assert result.lost > 100 * TOLERANCE  # something was quantized, and matters
    assert result.reloaded
    assert result.adapters > 0


def test_gradients_reach_every_adapter(result: Result) -> None:
    names = [n for n, m in result.model.named_modules() if isinstance(m, torch.nn.Linear)]
    towers = sum("vision" in name or "visual" in name for name in names)
    assert bool(towers) is result.kind.vision  # which may see nothing, or be looked past
    assert result.learned + towers >= result.adapters


def test_what_is_quantized(result: Result) -> None:
    names = {tensor.name for tensor in result.artifact.quantized}
    assert not [name for name in names if NEVER.search(name)]
    modules = [m for m in result.model.modules() if isinstance(m, IrqLinear | IrqExperts)]
    assert modules
    if not result.kind.vision:  # all but embeddings, heads, norms and routers
        left = [t.name for t in result.artifact.copied if len(t.shape) > 1]
        assert all(NEVER.search(name) for name in left), left
    else:
        towers = [
            t.name
            for t in result.artifact.copied
            if re.search(r"(layers|blocks)\.\d.*fc1.weight", t.name)
        ]
        assert bool(towers) is not result.kind.towers


def test_layout_of_experts(result: Result) -> None:
    experts = [m for m in result.model.modules() if isinstance(m, IrqExperts)]
    layouts = [layout for module in experts for layout in module.packed.values()]
    wanted = {"": None, "each": Separate}.get(result.kind.experts, Stacked)
    assert {type(layout) for layout in layouts} == ({wanted} if wanted else set())
    turned = {
        tensor.format.transposed for tensor in result.artifact.quantized if len(tensor.leading) > 1
    }
    if wanted is Stacked:
        assert turned == {"transposed" in result.kind.experts}


def test_the_report_says_why(result: Result) -> None:
    report = result.report
    assert sum(report.kept.values()) == report.weights - report.quantized_weights
    line = little_quantized(report.weights, report.quantized_weights, report.kept)
    assert (line is None) == (report.share >= 0.5)
    if line is not None:
        assert "--include-towers" in line
