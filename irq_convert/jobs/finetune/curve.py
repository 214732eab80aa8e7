"""The loss curve of a run: points from Trainer's log, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from irq_convert.checkpoint.files import write_bytes_atomic

CSV_NAME = "loss.csv"
PNG_NAME = "loss.png"
TRAIN, SMOOTH, HELD = "#B9D3E8", "#0072B2", "#D55E00"
SMOOTH_FROM = 20


@dataclass(frozen=True)
class Point:
    """What is known after a step; None for what was not measured there. Losses in nats a token."""

    step: int
    loss: float | None = None
    heldout_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None


def points(log: Iterable[Mapping[str, Any]], before: float | None) -> list[Point]:
    """One point for each step of Trainer's `log_history`, after that of step 0 if measured."""
    found: dict[int, dict[str, float]] = {}
    if before is not None:
        found[0] = {"heldout_loss": before}
    names = {
        "loss": "loss",
        "eval_loss": "heldout_loss",
        "learning_rate": "learning_rate",
        "grad_norm": "gradient_norm",
    }
    for entry in log:
        values = {new: float(entry[old]) for old, new in names.items() if old in entry}
        if values:
            found.setdefault(int(entry["step"]), {}).update(values)
    return [Point(step, **found[step]) for step in sorted(found)]


def write_csv(
    path: Path, curve: Sequence[Point], measure: str = "loss", trained_on: str = "loss"
) -> None:
    """Write `path` whole or not at all; `IrqError` when that fails.

    `measure` says in words what the numbers of held-out data are, `trained_on` those of steps.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    held, trained = ("kl" if words.startswith("KL") else "loss" for words in (measure, trained_on))
    names = {"loss": trained, "heldout_loss": f"heldout_{held}"}
    writer.writerow([names.get(field.name, field.name) for field in fields(Point)])
    writer.writerows(
        ["" if value is None else value for value in asdict(point).values()] for point in curve
    )
    write_bytes_atomic(path, text.getvalue().encode())


def draw(path: Path, curve: Sequence[Point], title: str, measure: str = "loss") -> bool:
    """Write the PNG `path`; False, and nothing written, where matplotlib is not installed.

    Raises `IrqError` when the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8.0, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    train = [(p.step, p.loss) for p in curve if p.loss is not None]
    held = [(p.step, p.heldout_loss) for p in curve if p.heldout_loss is not None]
    if train:
        many = len(train) >= SMOOTH_FROM
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN if many else SMOOTH, linewidth=1.0, label="training")
        if many:
            axes.plot(
                steps, smooth(losses), color=SMOOTH, linewidth=1.8, label="training, smoothed"
            )
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color=HELD, markersize=4, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel(f"{measure}, nats a token")
    axes.set_title(title, fontsize=11)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    if train or held:
        axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes_atomic(path, image.getvalue())
    return True


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a twentieth of the run, unbiased at its start."""
    keep = 1 - 1 / max(2.0, len(values) / 20)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result
