"""A sheet to draw on: boxes, lines, arrows and text, saved as one SVG file.

Every drawing has its own white background, so that it reads the same on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

INK, MUTED, LINE, PAPER, PANEL = "#1f2937", "#5b6472", "#94a3b8", "#ffffff", "#f6f8fa"
BLUE, BLUE_LIGHT = "#1d4ed8", "#dbeafe"
TEAL, TEAL_LIGHT = "#0f766e", "#d5f5ef"
AMBER, AMBER_LIGHT = "#b45309", "#fdf0d0"
VIOLET, VIOLET_LIGHT = "#6d28d9", "#ece8fd"
GREY, GREY_LIGHT = "#64748b", "#eef1f5"

SANS = "'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'SFMono-Regular', Menlo, Consolas, 'DejaVu Sans Mono', monospace"
Point = tuple[float, float]


class Canvas:
    """One drawing of `width` x `height`; `title` is what a screen reader says."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []
        self._heads: set[str] = set()

    def rect(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str = PAPER,
        stroke: str = "none",
        *,
        radius: float = 6,
        dashed: bool = False,
        weight: float = 1.5,
    ) -> None:
        """A box with its upper left corner at `x`, `y`."""
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(w)}" height="{_n(h)}" rx="{_n(radius)}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="{_n(weight)}"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        color: str = INK,
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
        turned: bool = False,
    ) -> None:
        """One line of text on the baseline `y`; `anchor` is start, middle or end."""
        turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turned else ""
        weight = ' font-weight="600"' if bold else ""
        family = f' font-family="{MONO}"' if mono else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{_n(size)}" fill="{color}" '
            f'text-anchor="{anchor}"{weight}{family}{turn}>{escape(words)}</text>'
        )

    def line(
        self,
        points: Sequence[Point],
        color: str = LINE,
        *,
        weight: float = 1.5,
        dashed: bool = False,
        arrow: bool = False,
    ) -> None:
        """A line through `points`, with an arrow head at its end if asked."""
        path = " ".join(
            f"{'M' if not n else 'L'}{_n(x)} {_n(y)}" for n, (x, y) in enumerate(points)
        )
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        head = ""
        if arrow:
            self._heads.add(color)
            head = f' marker-end="url(#head-{color[1:]})"'
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{_n(weight)}" '
            f'stroke-linejoin="round"{dash}{head}/>'
        )

    def fan(self, start: Point, ends: Sequence[Point], color: str, *, weight: float = 1.5) -> None:
        """Arrows from one point to several at its right, with one trunk and square corners."""
        bus = min(x for x, _ in ends) - 30
        self.line([start, (bus, start[1])], color, weight=weight)
        heights = [start[1], *(y for _, y in ends)]
        self.line([(bus, min(heights)), (bus, max(heights))], color, weight=weight)
        for end in ends:
            self.line([(bus, end[1]), end], color, weight=weight, arrow=True)

    def dot(self, x: float, y: float, color: str, radius: float = 4, shape: str = "dot") -> None:
        """A mark of a plot: dot, square, diamond or ring."""
        r = radius
        if shape == "square":
            self.rect(x - r, y - r, 2 * r, 2 * r, color, radius=0)
        elif shape == "diamond":
            r *= 1.3
            points = (
                f"{_n(x - r)},{_n(y)} {_n(x)},{_n(y - r)} {_n(x + r)},{_n(y)} {_n(x)},{_n(y + r)}"
            )
            self._parts.append(f'<polygon points="{points}" fill="{color}"/>')
        else:
            look = f'fill="{PAPER}" stroke="{color}" stroke-width="2"'
            look = look if shape == "ring" else f'fill="{color}"'
            self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}" {look}/>')

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        lines: Sequence[str],
        colors: tuple[str, str] = (GREY, GREY_LIGHT),
        *,
        dashed: bool = False,
        mono: bool = False,
    ) -> None:
        """A box with a bold first line and smaller ones under it, all in its middle."""
        self.rect(x, y, w, h, colors[1], colors[0], dashed=dashed)
        top = y + h / 2 - (len(lines) - 1) * 8.5 + 5
        for n, words in enumerate(lines):
            self.text(
                x + w / 2,
                top + n * 17,
                words,
                size=12 if n else 14,
                color=MUTED if n else INK,
                anchor="middle",
                bold=not n,
                mono=mono and not n,
            )

    def save(self, path: Path) -> None:
        """Write the drawing."""
        heads = "".join(
            f'<marker id="head-{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="{c}"/></marker>'
            for c in sorted(self._heads)
        )
        sheet = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" font-family="{SANS}">\n'
            f"<title>{escape(self.title)}</title>\n<defs>{heads}</defs>\n"
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="10" '
            f'fill="{PAPER}" stroke="#d5dbe3"/>\n'
        )
        path.write_text(sheet + "\n".join(self._parts) + "\n</svg>\n", encoding="utf-8")


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
