"""A file of sensitivities leads back to what was written, and one that was changed is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from irq_convert.artifact.sensitivity import (
    Sensitivity,
    View,
    Width,
    is_sensitivity,
    read_sensitivity,
    write_sensitivity,
)
from irq_convert.errors import IrqError

SOURCE = {"model": "m", "revision": None, "tensors_sha256": "0" * 64}
DAMAGES = st.dictionaries(
    st.text(st.characters(codec="ascii", categories=("L",)), min_size=1, max_size=8),
    st.lists(st.floats(0, 1e9), min_size=2, max_size=2),
    min_size=1,
    max_size=4,
)


def sensitivity(
    damages: dict[str, list[float]], depth: dict[str, float] | None = None
) -> Sensitivity:
    values = {name: np.array(own) for name, own in damages.items()}
    widths = {2: Width(0.5, 1.25, 0.1), 3: Width(0.25, 0.25, None)}
    depth = dict.fromkeys(damages, 1.0) | (depth or {})
    return Sensitivity(values, ("int2/64", "nf3/32"), widths, {"seed": 1}, SOURCE, depth)


@given(DAMAGES, st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, damages: dict[str, list[float]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("s") / "s.safetensors"
    wanted = sensitivity(damages, {name: data.draw(st.floats(0.25, 4)) for name in damages})
    assert write_sensitivity(path, wanted) == path.stat().st_size
    assert is_sensitivity(path)
    found = read_sensitivity(path)
    assert {n: list(v) for n, v in found.damages.items()} == damages
    assert (found.choices, found.widths) == (wanted.choices, wanted.widths)
    assert (found.settings, found.source) == (wanted.settings, wanted.source)
    assert found.depth == wanted.depth


def test_no_width_was_seen(tmp_path: Path) -> None:
    wanted = replace(sensitivity({"w": [1.0, 2.0]}), widths={})
    write_sensitivity(tmp_path / "s.safetensors", wanted)
    assert read_sensitivity(tmp_path / "s.safetensors").widths == {}


def test_damage_is_worth_what_its_width_was_seen_to_cost() -> None:
    found = sensitivity({"w": [0.125, 0.5]})
    assert found.damage("w", "int2/64", 2) == 0.125 * 2.5
    assert found.damage("w", "nf3/32", 3) == 0.5
    assert found.damage("w", "nf3/32", 4) == 0.5
    assert found.damage("w", "int2/64", 2, View(width=2.0)) == 0.125 * 2.5**2
    deep = sensitivity({"w": [0.125, 0.5], "v": [0.125, 0.5]}, {"w": 3.0})
    assert deep.damage("w", "nf3/32", 3) == 0.5
    assert deep.damage("w", "nf3/32", 3, View(depth=2.0)) == 0.5 * 9
    assert deep.damage("v", "nf3/32", 3, View(depth=2.0)) == 0.5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"format": "irq importance"}, "no file of sensitivities"),
        ({"format_version": "2"}, "of version '2'"),
        ({"choices": "{}"}, "choices in its metadata is no list"),
        ({"choices": '["int2/64"]'}, r"w is F64 \[2\], and it has to be F64 \[1\]"),
        ({"widths": '{"2": [0, 1, null]}'}, "widths in its metadata"),
        ({"widths": '{"2": 7}'}, "widths in its metadata"),
        ({"source": '{"model": "m"}'}, "source in its metadata lacks"),
        ({"settings": "["}, "settings in its metadata is no dict"),
    ],
)
def test_a_rule_that_is_broken_is_named(tmp_path: Path, change: dict[str, str], line: str) -> None:
    from irq_convert.checkpoint.header import read_header

    path = tmp_path / "s.safetensors"
    write_sensitivity(path, sensitivity({"w": [1.0, 2.0]}))
    metadata: dict[str, Any] = {**read_header(path).metadata, **change}
    save_file({"w": np.array([1.0, 2.0])}, path, metadata)
    with pytest.raises(IrqError, match=line):
        read_sensitivity(path)


@pytest.mark.parametrize("bad", [[float("nan"), 1.0], [-1.0, 1.0], [float("inf"), 0.0]])
def test_damages_that_are_none_are_named(tmp_path: Path, bad: list[float]) -> None:
    path = tmp_path / "s.safetensors"
    write_sensitivity(path, sensitivity({"w": bad}))
    with pytest.raises(IrqError, match="w has values that are no numbers from 0"):
        read_sensitivity(path)


def test_factors_of_depth_that_are_not_of_the_tensors(tmp_path: Path) -> None:
    from irq_convert.checkpoint.header import read_header

    path = tmp_path / "s.safetensors"
    write_sensitivity(path, sensitivity({"w": [1.0, 2.0]}))
    metadata = dict(read_header(path).metadata)
    save_file({"w": np.array([1.0, 2.0]), "irq.depth": np.ones(2)}, path, metadata)
    with pytest.raises(
        IrqError, match=r"irq.depth is F64 \[2\], .* F64 \[1\], one for each tensor"
    ):
        read_sensitivity(path)
