"""Merges that are continued, shard by shard; figures do not depend on threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.core.blocks import BlockShape
from irq_convert.core.tensor_stats import TensorStats
from irq_convert.core.threads import torch_threads
from irq_convert.errors import UsageError
from irq_convert.jobs.common.resume import Resume
from irq_convert.jobs.merge import job as resume
from irq_convert.jobs.merge.estimate import estimate_merge
from irq_convert.jobs.merge.job import decode_outcome, encode_outcome
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.merge.outcome import Outcome, sum_of_squares
from irq_convert.jobs.merge.pipeline import merge_shard
from irq_convert.jobs.merge.stored_moves import Cost, MoveCosts
from tests.folders import listing

from .make import write_adapter

FINITE = st.floats(0, 1e300)
COSTS = st.builds(Cost, FINITE | st.just(float("inf")), FINITE, st.integers(0, 1 << 40))


@pytest.fixture(scope="module")
def base(tiny_nf4: Path) -> Path:
    return tiny_nf4


def options(to: MergeTo, **more: Any) -> MergeOptions:
    limits = {"max_shard_bytes": 20_000, "threads": 1, "check": Check.LAYERS}
    return MergeOptions(to=to, **{**limits, **more})


def stop(base: Path, adapter: Path, out: Path, how: MergeOptions) -> Path:
    """Interrupt a merge at its fourth shard; the folder that it left."""
    made = 0

    def fail(*args: Any) -> Any:
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt
        return merge_shard(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "merge_shard", fail)
        with pytest.raises(KeyboardInterrupt):
            merge(base, adapter, out, how)
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize("kind", ["iec", "block"])
@pytest.mark.parametrize("to", [MergeTo.DENSE, MergeTo.IRQ])
def test_a_merge_is_continued(base: Path, tmp_path: Path, to: MergeTo, kind: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, kind=kind)
    how = options(to, **({"min_survival": -9.0} if to == MergeTo.IRQ else {}))
    whole = merge(base, adapter, tmp_path / "whole", how)
    out = tmp_path / "out"
    partial = stop(base, adapter, out, how)
    times = {p.name: p.stat().st_mtime_ns for p in partial.glob("files/*")}
    assert len(times) == 3
    assert estimate_merge(base, adapter, out, how).finished == 3
    report = merge(base, adapter, out, how)
    assert listing(out) == listing(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    for figure in ("layers", "tau", "survived", "bytes_out", "dtypes"):
        assert getattr(report, figure) == getattr(whole, figure)


def test_another_merge_is_refused(base: Path, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", base, seed=1)
    two = write_adapter(tmp_path / "two", base, seed=2)
    out, how = tmp_path / "out", options(MergeTo.DENSE)
    stop(base, one, out, how)
    with pytest.raises(UsageError, match=r"the source's adapter was .* --resume never"):
        merge(base, two, out, how)
    with pytest.raises(UsageError, match="job was merge to dense and is merge to irq now"):
        merge(base, one, out, options(MergeTo.IRQ))
    merge(base, two, out, options(MergeTo.DENSE, resume=Resume.NEVER))
    merge(base, two, tmp_path / "other", how)
    assert listing(out) == listing(tmp_path / "other")


@given(FINITE, FINITE, FINITE, st.none() | COSTS, st.booleans())
def test_outcomes_come_back(
    energy: float, error: float, change: float, cost: Cost | None, again: bool
) -> None:
    stats = TensorStats(BlockShape(2, 40, 32, 4), 9, 5, np.ones((2, 2))) if again else None
    costs = None if cost is None else MoveCosts(cost)
    outcome = Outcome(energy, error, change, stats, costs, costs)
    found = decode_outcome(json.loads(json.dumps(encode_outcome(outcome))))
    assert (found.energy, found.error, found.change) == (energy, error, change)
    assert found.tau == found.scale == costs
    assert (found.stats is None) is (stats is None)


def test_sums_do_not_depend_on_threads() -> None:
    values = torch.randn(3000, 301, generator=torch.Generator().manual_seed(0))
    found = set()
    for threads in (1, 2, 7):
        with torch_threads(threads):
            found.add(sum_of_squares(values))
    assert len(found) == 1
    assert found.pop() == pytest.approx(float(values.double().square().sum()), rel=1e-12)
