"""A pair of axes on a sheet: numbers to points, ticks, and a frame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from canvas import LINE, MUTED, Canvas

GRID = "#e3e8ee"


@dataclass(frozen=True)
class Axes:
    """A rectangle of the sheet that shows `xs` by `ys` (lowest and highest number)."""

    left: float
    top: float
    width: float
    height: float
    xs: tuple[float, float]
    ys: tuple[float, float]
    log: bool = False

    def x(self, value: float) -> float:
        """Where a number of the horizontal axis lies."""
        low, high = self.xs
        return self.left + (value - low) / (high - low) * self.width

    def y(self, value: float) -> float:
        """Where a number of the vertical axis lies."""
        low, high = self.ys
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.top + (high - value) / (high - low) * self.height

    def frame(
        self, c: Canvas, xs: Mapping[float, str], ys: Mapping[float, str], below: str, beside: str
    ) -> None:
        """Draw grid, ticks and the words for both axes."""
        bottom = self.top + self.height
        for value, words in ys.items():
            y = self.y(value)
            c.line([(self.left, y), (self.left + self.width, y)], GRID, weight=1)
            c.text(self.left - 8, y + 4, words, size=11.5, color=MUTED, anchor="end")
        for value, words in xs.items():
            c.line([(self.x(value), bottom), (self.x(value), bottom + 5)], LINE, weight=1)
            c.text(self.x(value), bottom + 20, words, size=11.5, color=MUTED, anchor="middle")
        c.line([(self.left, bottom), (self.left + self.width, bottom)], LINE)
        c.text(self.left + self.width / 2, bottom + 42, below, size=12.5, anchor="middle")
        middle = self.top + self.height / 2
        c.text(self.left - 50, middle, beside, size=12.5, anchor="middle", turned=True)
