"""Accuracy against size: KL divergence to the source by bits a weight, from accuracy.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from canvas import AMBER, BLUE, GREY, MUTED, TEAL, Canvas
from plot import Axes

SERIES = {
    "none": (GREY, "square", "none: not calibrated"),
    "entropy": (BLUE, "dot", "entropy: ICQ, the default"),
    "entropy, refine 10": (TEAL, "diamond", "entropy, --refine 10"),
    "mse": (AMBER, "ring", "mse"),
}
TICKS = {0.05: "0.05", 0.1: "0.1", 0.2: "0.2", 0.5: "0.5", 1.0: "1", 2.0: "2", 5.0: "5"}
MODELS = {"stories15M": "15 M parameters", "stories260K": "260 thousand parameters"}
APART = 0.045
"""Marks of one size are drawn beside each other, by this many bits."""


def draw() -> Canvas:
    found = json.loads(Path(__file__).with_name("accuracy.json").read_text(encoding="utf-8"))
    c = Canvas(1040, 500, "KL divergence to the source against bits per weight")
    c.text(30, 40, "What is lost at 2, 3 and 4 bits, normal-float codebooks", size=17, bold=True)
    words = "lower is better; marks of one size stand beside each other"
    c.text(1010, 40, words, size=11.5, color=MUTED, anchor="end")
    for n, (name, size) in enumerate(MODELS.items()):
        sizes, series = found["bits_per_weight"][name], found["kl"][name]
        _panel(c, 90 + n * 510, f"{name}, {size}", sizes, series)
    x = 90.0
    for color, shape, words in SERIES.values():
        c.dot(x + 6, 471, color, 5, shape)
        c.text(x + 18, 475, words, size=12.5)
        x += len(words) * 7 + 44
    c.text(1010, 475, "tests/bench/quality.py", size=11.5, color=MUTED, anchor="end", mono=True)
    return c


def _panel(c: Canvas, left: float, title: str, sizes: list[float], series: dict[str, Any]) -> None:
    axes = Axes(left, 92, 410, 300, (2.0, 4.6), (0.05, 8.0), log=True)
    ticks = {size: f"{size:.2f}" for size in sizes}
    axes.frame(c, ticks, TICKS, "bits per quantized weight", "KL divergence, nats")
    c.text(left, 76, title, bold=True)
    for n, (name, (color, shape, _)) in enumerate(SERIES.items()):
        shift = (n - (len(SERIES) - 1) / 2) * APART
        places = [
            (axes.x(size + shift), axes.y(kl))
            for size, (kl, _) in zip(sizes, series[name], strict=True)
        ]
        c.line(places, color, weight=1.25)
        for place in places:
            c.dot(*place, color, 4.5, shape)
