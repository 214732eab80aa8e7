"""What a band of layers counts for: seen in truth, of one mean, and heard by the choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.artifact.sensitivity import Sensitivity, View, Width
from irq_convert.jobs.common.metrics import MeanEstimate
from irq_convert.jobs.sizing import measure as measuring
from irq_convert.jobs.sizing.choices import Choice
from irq_convert.jobs.sizing.depth import LARGEST, Bands
from irq_convert.jobs.sizing.measure import compare, measure_sensitivity
from irq_convert.jobs.sizing.mix import Market
from irq_convert.jobs.sizing.rules import Group
from irq_convert.progress import Progress
from tests.jobs.sizing.test_measure import BASE, CHOICES, drawn_ids, subject

Make = Callable[[str], Path]
NAMES = ("int2/32", "int3/64", "nf4/32")


def test_a_band_is_seen_in_truth(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the pass has seen of a band is what a mix of these choices does."""
    told: dict[str, MeanEstimate] = {}
    factors = Bands.factors

    def listen(*args: object) -> dict[str, float]:
        told.update(args[4])  # type: ignore[call-overload]
        return factors(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring.Bands, "factors", listen)
    own = subject(make("Llama 3"), drawn_ids(), None)
    found = measure_sensitivity(own, CHOICES, {"a": 1}, {"b": 2}, tmp_path, Progress())
    low, high = (choice.spec(BASE) for choice in CHOICES[:2])
    for layer in (0, 1):
        mix = {name: high if f".layers.{layer}." in name else low for name in own.tensors}
        folder = tmp_path / str(layer)
        folder.mkdir()
        seen = compare(own, {"mix": mix}, folder, Progress())["mix"]
        assert told[f"band {layer}"].value == pytest.approx(seen.value, rel=1e-6)
    assert set(found.depth) == set(own.tensors)
    assert len(set(found.depth.values())) == 2  # one for each layer


@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=6))
def test_the_mean_stays(gains: list[float]) -> None:
    """Factors move damage between bands: the way from 2 to 3 bits is what it was."""
    count = len(gains)
    damages = {f"w{at}": np.array([2.0, 1.0, 0.1]) for at in range(count)}
    widths = {2: Width(2.0 * count, 10.0, None), 3: Width(1.0 * count, 4.0, None)}
    seen = {f"band {at}": MeanEstimate(10.0 - gain, None) for at, gain in enumerate(gains)}
    bands = Bands(tuple(frozenset({name}) for name in damages), *CHOICES[:2])
    found = bands.factors(damages, NAMES, widths, seen)
    assert sum(found.values()) == pytest.approx(count)
    for at, gain in enumerate(gains):
        assert found[f"w{at}"] / found["w0"] == pytest.approx(gain / gains[0])


def test_a_band_that_seems_to_count_for_nothing_counts_for_a_part() -> None:
    damages = {f"w{at}": np.array([2.0, 1.0, 0.1]) for at in range(9)}
    widths = {2: Width(18.0, 10.0, None), 3: Width(9.0, 4.0, None)}
    values = [10.5, 4.0, *[9.5] * 7]  # worse with more bits, and the whole way alone
    seen = {f"band {at}": MeanEstimate(value, None) for at, value in enumerate(values)}
    bands = Bands(tuple(frozenset({name}) for name in damages), *CHOICES[:2])
    found = bands.factors(damages, NAMES, widths, seen)
    assert found["w0"] == 1 / LARGEST
    assert found["w1"] == LARGEST
    worse = {name: MeanEstimate(11.0, None) for name in seen}
    assert bands.factors(damages, NAMES, widths, worse) == {}
    assert bands.factors(damages, NAMES, {2: widths[2]}, seen) == {}


def test_the_choice_hears_of_it() -> None:
    """Of two weights alike the one that lies where more counts gets more bits."""
    choices = (Choice("nf2", 64), Choice("nf3", 64))
    damages = {name: np.array([2.0, 1.0]) for name in ("early", "late")}
    depth = {"early": 0.5, "late": 1.5}
    found = Sensitivity(damages, ("nf2/64", "nf3/64"), {}, {}, {}, depth)
    groups = tuple(Group((name,), choices) for name in damages)
    market = Market(groups, found, lambda name, choice: 10 * choice.bits)
    mix = market.best(50, View(depth=1.0))
    assert mix is not None
    assert {name: choice.bits for name, choice in mix.choices.items()} == {"early": 2, "late": 3}
