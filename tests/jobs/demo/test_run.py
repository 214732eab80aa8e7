"""The demo at 2 bits: what the table must show for the method to be worth anything."""

from __future__ import annotations

from pathlib import Path
from typing import TypeGuard

import pytest

from irq_convert.jobs.demo import demo as run
from irq_convert.jobs.demo import journey


@pytest.mark.slow
def test_two_bit_damage_shows_and_calibration_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BITS", (2,))
    monkeypatch.setattr(run, "WINDOWS", 12)
    monkeypatch.setattr(run, "run_journey", lambda *_: iter(()))
    source, plain, calibrated, refined = (r for r in run.run_demo(tmp_path) if _is_row(r))
    assert source.kl is None
    assert plain.perplexity > 1.2 * source.perplexity
    assert plain.kl is not None
    assert calibrated.kl is not None
    assert refined.kl is not None
    assert plain.kl > calibrated.kl > refined.kl
    assert plain.entropy is not None
    assert calibrated.entropy is not None
    assert calibrated.entropy > plain.entropy
    assert plain.megabytes < source.megabytes / 2


def _is_row(row: run.DemoRow | run.DemoStep) -> TypeGuard[run.DemoRow]:
    return isinstance(row, run.DemoRow)


@pytest.mark.slow
def test_adapters_win_back_what_two_bits_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BITS", (2,))
    monkeypatch.setattr(run, "VARIANTS", (("ICQ", "entropy", 0),))
    monkeypatch.setattr(run, "WINDOWS", 4)
    monkeypatch.setitem(journey.RECIPE, "steps", 8)
    monkeypatch.setattr(journey, "STORIES", 100)
    steps = {row.name: row for row in run.run_demo(tmp_path) if not _is_row(row)}
    base = steps.pop("2 bit, ICQ")
    assert all(step.perplexity < 0.95 * base.perplexity for step in steps.values())
    for kind, target in journey.MERGES:
        trained = steps[f"finetune --lora {kind.value}"].perplexity
        merged = steps[f"merge --to {target.value}, {kind.value}"].perplexity
        assert merged == pytest.approx(trained, rel=1e-3)
    packed = steps["merge --to irq, block"]
    assert packed.megabytes < 1.2 * base.megabytes
