"""Peak memory by number of layers, beside the size of the source, from memory.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from canvas import BLUE, GREY, MUTED, VIOLET, Canvas
from plot import Axes

COLORS = {"quantize": (BLUE, "dot"), "merge --to dense": (VIOLET, "square")}
LAYERS = {n: str(n) for n in (2, 4, 8, 16, 20)}


def draw() -> Canvas:
    found = json.loads(Path(__file__).with_name("memory.json").read_text(encoding="utf-8"))
    c = Canvas(1040, 450, "Peak memory against the number of layers")
    c.text(30, 40, "Peak memory by number of layers, 7B shapes, bfloat16", size=17, bold=True)
    _beside_source(c, found)
    _close(c, found)
    words = "tests/bench/memory.py, tests/bench/merge_memory.py"
    c.text(1010, 40, words, size=11.5, color=MUTED, anchor="end", mono=True)
    return c


def _beside_source(c: Canvas, found: dict[str, Any]) -> None:
    axes = Axes(90, 92, 410, 280, (0, 22), (0, 8))
    axes.frame(c, LAYERS, {n: str(n) for n in range(0, 9, 2)}, "layers", "GB")
    c.text(90, 76, "beside the weight files that are read", bold=True)
    places = [(axes.x(n), axes.y(size)) for n, size in found["source_gb"]["points"]]
    c.line(places, GREY, dashed=True)
    for place in places:
        c.dot(*place, GREY, 5, "diamond")
    c.text(axes.x(10.5), axes.y(5.6), "source on disk", color=GREY, anchor="end")
    for run in found["runs"]:
        _run(c, axes, run, 1000)
    c.text(axes.x(10), axes.y(1.2), "peak memory", color=BLUE, anchor="middle")


def _close(c: Canvas, found: dict[str, Any]) -> None:
    axes = Axes(600, 92, 410, 280, (0, 22), (0, 1000))
    axes.frame(c, LAYERS, {n: str(n) for n in range(0, 1001, 200)}, "layers", "MB")
    c.text(600, 76, "the same runs, closer", bold=True)
    for run in found["runs"]:
        _run(c, axes, run, 1)
    for n, (name, (color, shape)) in enumerate(COLORS.items()):
        c.dot(620, 268 + n * 24, color, 5, shape)
        c.text(634, 272 + n * 24, name, size=12.5)
    c.text(
        614, 336, "a line joins the two depths of one run of a benchmark;", size=11.5, color=MUTED
    )
    c.text(614, 352, "4 and 20 layers ran on a loaded machine", size=11.5, color=MUTED)


def _run(c: Canvas, axes: Axes, run: dict[str, Any], unit: float) -> None:
    color, shape = COLORS[run["job"]]
    places = [(axes.x(n), axes.y(mb / unit)) for n, mb in run["points"]]
    c.line(places, color, weight=1.25)
    for place in places:
        c.dot(*place, color, 4, shape)
