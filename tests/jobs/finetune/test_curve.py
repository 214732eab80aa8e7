"""The loss curve: points, CSV and picture."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from irq_convert.jobs.finetune.curve import Point, draw, points, smooth, write_csv

LOG = [
    {"loss": 2.0, "learning_rate": 1e-3, "grad_norm": 0.5, "step": 1, "epoch": 0.1},
    {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.4, "step": 2, "epoch": 0.2},
    {"eval_loss": 1.7, "step": 2, "epoch": 0.2},
    {"train_runtime": 3.0, "total_flos": 1.0, "step": 2, "epoch": 0.2},
]


def test_points_join_what_belongs_to_a_step() -> None:
    assert points(LOG, 2.2) == [
        Point(0, heldout_loss=2.2),
        Point(1, 2.0, None, 1e-3, 0.5),
        Point(2, 1.5, 1.7, 1e-3, 0.4),
    ]
    assert points([], None) == []


def test_the_table(tmp_path: Path) -> None:
    curve = points(LOG, 2.2)
    write_csv(tmp_path / "loss.csv", curve)
    with (tmp_path / "loss.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    assert [row["heldout_loss"] for row in rows] == ["2.2", "", "1.7"]
    assert float(rows[2]["loss"]) == 1.5


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_the_picture(tmp_path: Path, steps: int) -> None:
    pytest.importorskip("matplotlib")
    curve = [Point(n, loss=1 / n, heldout_loss=2 / n if n % 5 == 1 else None)
             for n in range(1, steps + 1)]  # fmt: skip
    assert draw(tmp_path / "loss.png", curve, "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not draw(tmp_path / "loss.png", points(LOG, None), "title")
    assert not list(tmp_path.iterdir())


def test_smoothing_keeps_a_constant_and_the_first_value() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([1.0, 5.0])[0] == 1.0
    assert 0.2 < smooth([0.0, 1.0] * 50)[-1] < 0.8
