"""Objectives and zero points by name: strings wherever they are kept, and a search for each."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.kernels.search import ENTROPY, ERROR
from irq_convert.core.objective import Objective, ZeroPoint
from irq_convert.core.search_plan import ZERO_POINT_SCALES, plan_search
from irq_convert.core.spec import OBJECTIVES, ZERO_POINTS, QuantSpec
from irq_convert.errors import UsageError


def test_order_of_help_and_of_messages() -> None:
    assert list(Objective) == ["entropy", "mse", "none"]
    assert OBJECTIVES == ("none", "entropy", "mse")
    assert ZERO_POINTS == ("float", "integer")
    assert all(type(name) is str for name in (*OBJECTIVES, *ZERO_POINTS))
    with pytest.raises(UsageError, match=r"'x': choose one of none, entropy, mse$"):
        QuantSpec(objective="x")
    with pytest.raises(UsageError, match=r"'x': choose one of float, integer$"):
        QuantSpec(zero_point="x")


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("zero_point", ZeroPoint)
def test_a_spec_keeps_plain_strings(objective: Objective, zero_point: ZeroPoint) -> None:
    spec = QuantSpec("int3", 64, objective, 0, zero_point)
    plain = QuantSpec("int3", 64, objective.value, 0, zero_point.value)
    assert spec == plain
    assert hash(spec) == hash(plain)
    assert repr(spec) == repr(plain)
    assert json.dumps(asdict(spec)) == json.dumps(asdict(plain))
    assert type(spec.objective) is type(spec.zero_point) is type(spec.tau_dtype) is str


def test_auto_becomes_a_plain_string() -> None:
    found = {name: QuantSpec(name).objective for name in CODEBOOKS}
    assert found == {name: "entropy" if name.startswith("nf") else "mse" for name in CODEBOOKS}
    assert all(type(objective) is str for objective in found.values())


@pytest.mark.parametrize("objective", Objective)
def test_every_objective_has_a_meaning_and_a_search(objective: Objective) -> None:
    assert objective.meaning
    assert objective in ZERO_POINT_SCALES
    for name in CODEBOOKS:
        plan = plan_search(QuantSpec(name, 64, objective))
        assert plan.objective == (ERROR if objective == Objective.MSE else ENTROPY)
