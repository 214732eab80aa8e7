"""The demo at 2 bits: what the table must show for the method to be worth anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from irq_convert.demo import run


@pytest.mark.slow
def test_two_bit_damage_shows_and_calibration_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BITS", (2,))
    monkeypatch.setattr(run, "WINDOWS", 12)
    source, plain, calibrated, refined = run.run_demo(tmp_path)
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
