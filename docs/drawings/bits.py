"""The bits of one row: packed codes, scale and tau codes, their grids, and the formula."""

from __future__ import annotations

import struct

from canvas import (
    AMBER,
    AMBER_LIGHT,
    BLUE,
    BLUE_LIGHT,
    GREY,
    GREY_LIGHT,
    INK,
    LINE,
    MUTED,
    PANEL,
    PAPER,
    TEAL,
    TEAL_LIGHT,
    VIOLET,
    VIOLET_LIGHT,
    Canvas,
)

LEFT, UNIT = 165, 5.28
"""Where the row begins, and the width of a weight."""
BLOCKS = (64, 64, 32)
CODES = (5, 3, 6, 0, 2, 4, 7, 1)
"""Of the first eight weights, made up."""
NF3 = (-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.5626170, 1)
SCALE, TAU = (2**-12, 60, 100), (2**-13, -128, 117)
"""Step, offset and stored code of the first block, made up."""
BIT = 28.5


def draw() -> Canvas:
    c = Canvas(1040, 700, "How one row of weights is stored: packed codes, statistics, grids")
    c.text(30, 40, "One row of 160 weights, nf3, blocks of 64", size=17, bold=True)
    words = "no block crosses the end of a row: the last may be short"
    c.text(1010, 40, words, size=11.5, color=MUTED, anchor="end")
    _row(c)
    _codes(c)
    _statistics(c)
    _formula(c)
    return c


def _row(c: Canvas) -> None:
    _name(c, 82, "weights", "a row of W")
    x = LEFT
    for n, size in enumerate(BLOCKS):
        tail = size < BLOCKS[0]
        c.rect(x, 62, size * UNIT, 36, GREY_LIGHT, GREY, dashed=tail, radius=3)
        words = f"tail block: {size} weights" if tail else f"block {n}: {size} weights"
        c.text(x + size * UNIT / 2 + (14 if n == 0 else 0), 85, words, anchor="middle")
        x += size * UNIT
    c.rect(LEFT, 62, 8 * UNIT, 36, BLUE_LIGHT, BLUE, radius=3)
    c.line([(LEFT, 98), (LEFT, 142)], BLUE, dashed=True)
    c.line([(LEFT + 8 * UNIT, 98), (LEFT + 24 * BIT, 142)], BLUE, dashed=True)
    c.text(LEFT + 12, 133, "the first 8 weights, in 24 bits", size=11.5, color=BLUE)


def _codes(c: Canvas) -> None:
    top = 166
    _name(c, top + 20, "t", "packed codes, U8")
    for code, value in enumerate(CODES):
        fill = BLUE_LIGHT if code % 2 == 0 else PAPER
        x = LEFT + code * 3 * BIT
        c.text(
            x + 1.5 * BIT, top - 9, f"code {code} = {value}", size=11, anchor="middle", color=BLUE
        )
        for j in range(3):
            c.rect(x + j * BIT, top, BIT, 32, fill, LINE, radius=0, weight=1)
            digit = str(value >> j & 1)
            c.text(x + (j + 0.5) * BIT, top + 21, digit, size=14, anchor="middle", mono=True)
    for n in range(24):
        x = LEFT + (n + 0.5) * BIT
        c.text(x, top + 46, str(n % 8), size=10, color=MUTED, anchor="middle")
    for n in range(4):
        x = LEFT + n * 8 * BIT
        c.line([(x, top - 3), (x, top + 68)], INK, weight=2)
        if n < 3:
            c.text(x + 4 * BIT, top + 66, f"byte {n}", size=12, anchor="middle", bold=True)
    x = LEFT + 24 * BIT + 16
    notes = (
        "a code begins with its",
        "least significant bit;",
        "it may cross bytes;",
        "a row begins on a byte",
    )
    for n, words in enumerate(notes):
        c.text(x, top + 8 + n * 15, words, size=11.5, color=MUTED)


def _statistics(c: Canvas) -> None:
    rows = (
        (292, "t_scale", TEAL, TEAL_LIGHT, SCALE[2], (212, 186)),
        (348, "t_tau", VIOLET, VIOLET_LIGHT, TAU[2], (99, 131)),
    )
    c.text(LEFT, 272, "one byte of each for every block of the row", size=11.5, color=MUTED)
    grid = LEFT + 160 * UNIT - 56
    for top, name, color, light, first, others in rows:
        _name(c, top + 17, name, "codes, U8")
        x = LEFT
        for size, value in zip(BLOCKS, (first, *others), strict=True):
            wide = size * UNIT
            c.line([(x + 4, top - 4), (x + wide - 4, top - 4)], color, weight=1)
            c.rect(x + wide / 2 - 30, top, 60, 30, light, color, radius=3)
            c.text(x + wide / 2, top + 20, str(value), anchor="middle", mono=True)
            x += wide
    _grids(c, grid)


def _grids(c: Canvas, x: float) -> None:
    top = 418
    c.rect(LEFT, top, 160 * UNIT, 86, PANEL, "#d5dbe3")
    _name(c, top + 36, "grids", "F32, two numbers")
    c.text(LEFT + 16, top + 24, "256 consecutive blocks, over the ends of rows, share", size=12.5)
    c.text(LEFT + 16, top + 41, "one grid for their scales and one for their taus.", size=12.5)
    words = "Without tails: 3 + 16 / 64 + 0.01 = 3.26 bits a weight"
    c.text(LEFT + 16, top + 67, words, size=12.5, color=MUTED)
    for n, (name, color, light, values) in enumerate(
        (("t_scale_grid", TEAL, TEAL_LIGHT, SCALE), ("t_tau_grid", VIOLET, VIOLET_LIGHT, TAU))
    ):
        y = top + 10 + n * 36
        c.text(x - 278, y + 20, name, size=12.5, mono=True, color=color)
        for at, wide, words in (
            (0, 112, f"step {values[0]:.4g}"),
            (118, 92, f"offset {values[1]}"),
        ):
            c.rect(x - 170 + at, y, wide, 30, light, color, radius=3)
            c.text(x - 170 + at + wide / 2, y + 20, words, size=11.5, anchor="middle")


def _formula(c: Canvas) -> None:
    top = 526
    scale, tau = (_round32(step * (code + offset)) for step, offset, code in (SCALE, TAU))
    level = _round32(NF3[CODES[0]])
    weight = _round32(_round32(level * scale) + tau)
    c.rect(30, top, 980, 148, AMBER_LIGHT, AMBER, radius=8)
    c.text(54, top + 36, "w = level[code] * scale + tau", size=21, mono=True, bold=True)
    c.text(54, top + 68, "scale = step * (code + offset)", mono=True)
    c.text(54, top + 88, "tau = step * (code + offset)", mono=True)
    c.text(54, top + 114, "float32, rounded after each product and each sum", size=12, color=MUTED)
    c.text(54, top + 131, "level: the table of the codebook, from -1 to 1", size=12, color=MUTED)
    x = 520
    c.text(x, top + 32, "The first weight, to four digits:", bold=True)
    lines = (
        f"scale = {SCALE[0]:.4g} * ({SCALE[2]} + {SCALE[1]}) = {scale:.4g}",
        f"tau = {TAU[0]:.4g} * ({TAU[2]} - {-TAU[1]}) = {tau:.4g}",
        f"level[{CODES[0]}] = {level:.4g}",
        f"w = {level:.4g} * {scale:.4g} - {-tau:.4g} = {weight:.4g}",
    )
    for n, words in enumerate(lines):
        c.text(x, top + 60 + n * 22, words, mono=True)


def _name(c: Canvas, y: float, name: str, what: str) -> None:
    c.text(30, y, name, size=13.5, mono=True, bold=True)
    c.text(30, y + 16, what, size=11.5, color=MUTED)


def _round32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
