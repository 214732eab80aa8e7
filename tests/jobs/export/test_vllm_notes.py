"""What vLLM was seen not to load is said in a line; a folder that it loads has none."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from irq_convert.core.blocks import BlockShape
from irq_convert.jobs.export.compressed_tensors_config import Kept
from irq_convert.jobs.export.vllm_notes import vllm_notes

MODULES = tuple(f"layers.0.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
ALIKE = dict.fromkeys(MODULES, Kept(4, 64))


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: BlockShape


def notes(kept: dict[str, Kept], rows: int = 64, dense: tuple[str, ...] = ()) -> tuple[str, ...]:
    tensors = [Tensor(f"{m}.weight", BlockShape(rows, 128, 64, k.bits)) for m, k in kept.items()]
    return vllm_notes(tensors, kept, {"lm_head", *dense})  # type: ignore[arg-type]


def test_one_width_for_all_has_no_note() -> None:
    assert notes(ALIKE) == ()


@pytest.mark.parametrize("bits", [2, 3])
def test_other_widths(bits: int) -> None:
    (note,) = notes(dict.fromkeys(MODULES, Kept(bits, 64)))
    assert f"does not load {bits} bits" in note


def test_odd_shapes() -> None:
    (note,) = notes(ALIKE, rows=48)
    assert "layers.0.q_proj.weight [48, 128]" in note


@pytest.mark.parametrize(("module", "other"), [("k", "q"), ("up", "gate")])
def test_merged_matrices_that_differ(module: str, other: str) -> None:
    name, first = f"layers.0.{module}_proj", f"layers.0.{other}_proj"
    for own in ({name: Kept(4, 32)}, {}):  # of another group, and dense
        kept = {m: own.get(m, ALIKE[m]) for m in MODULES if m != name or own}
        dense = () if own else (name,)
        (note,) = notes(kept, dense=dense)
        assert first in note
        assert name in note
    assert notes(ALIKE | {"layers.0.down_proj": Kept(4, 32)}) == ()
