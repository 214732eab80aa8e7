"""Quantizing as a pipeline: headers, plan, shards, the three that overlap, and the rename."""

from __future__ import annotations

from canvas import (
    AMBER,
    AMBER_LIGHT,
    BLUE,
    BLUE_LIGHT,
    GREY,
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

STAGES = (
    (330, ("reader", "tiles of rows, ahead,", "in a thread"), (TEAL, TEAL_LIGHT)),
    (560, ("search", "codes, scales, taus;", "all threads, or a GPU"), (BLUE, BLUE_LIGHT)),
    (790, ("writer", "packed parts, behind,", "in a thread"), (VIOLET, VIOLET_LIGHT)),
)
PLACES = (
    ("files/", "finished shards,", "flushed to the disk"),
    ("records/", "size, checksum and", "figures of each"),
    ("manifest", "and index, config,", "tokenizer, last"),
)
WIDE = 164


def draw() -> Canvas:
    c = Canvas(1040, 520, "Quantizing as a pipeline")
    lines: tuple[str, ...] = ("headers", "a few kilobytes", "of each source file")
    c.box(30, 70, 190, 74, lines)
    lines = ("plan", "what is quantized, which", "shard it goes to, exact", "bytes and disk space")
    c.box(30, 190, 190, 96, lines, (AMBER, AMBER_LIGHT))
    c.line([(125, 144), (125, 187)], AMBER, arrow=True, weight=2)
    c.text(125, 308, "--dry-run ends here", size=11.5, color=MUTED, anchor="middle")
    c.line([(220, 238), (297, 238)], AMBER, arrow=True, weight=2)
    _shards(c)
    _partial(c)
    return c


def _shards(c: Canvas) -> None:
    for n in (2, 1):
        c.rect(300 + 7 * n, 52 - 7 * n, 696, 248, PAPER, LINE, radius=8)
    c.rect(300, 52, 696, 248, PANEL, GREY, radius=8)
    c.text(320, 80, "for each output shard", size=14, bold=True)
    c.text(976, 80, "torchrun: shards are shared out", size=11.5, color=MUTED, anchor="end")
    for x, lines, colors in STAGES:
        c.box(x, 112, WIDE, 82, lines, colors)
    for x in (494, 724):
        c.line([(x, 153), (x + 63, 153)], INK, arrow=True, weight=2)
        c.text(x + 32, 143, "tiles", size=11.5, color=MUTED, anchor="middle")
    lines = (
        "The three work at the same time. A tile is whole groups of 256 blocks, so",
        "its size changes no byte. A few tiles are held, whatever the model's size.",
    )
    for n, words in enumerate(lines):
        c.text(330, 226 + 18 * n, words, size=12.5)
    words = "Tensors that are not quantized pass from reader to writer as they are."
    c.text(330, 274, words, size=12.5, color=MUTED)


def _partial(c: Canvas) -> None:
    top = 358
    c.line([(872, 194), (872, 328), (700, 328), (700, top - 3)], VIOLET, arrow=True, weight=2)
    c.text(690, 333, "each finished shard", size=11.5, color=MUTED, anchor="end")
    c.rect(300, top, 522, 138, AMBER_LIGHT, AMBER, radius=8, dashed=True)
    c.text(320, top + 27, "OUT.partial", size=14, bold=True, mono=True)
    for n, (name, *lines) in enumerate(PLACES):
        x = 320 + n * 158 + (24 if n == 2 else 0)
        c.rect(x, top + 41, 146, 80, PAPER, GREY)
        c.text(x + 12, top + 62, name, bold=True, mono=True)
        for k, words in enumerate(lines):
            c.text(x + 12, top + 83 + k * 18, words, size=12, color=MUTED)
    c.line([(624, top + 81), (657, top + 81)], INK, arrow=True, weight=2)
    c.line([(822, top + 81), (889, top + 81)], BLUE, arrow=True, weight=2)
    c.text(854, top + 70, "rename", size=11.5, color=BLUE, anchor="middle")
    lines = ("OUT", "whole, or", "not there")
    c.box(892, top + 41, 104, 80, lines, (BLUE, BLUE_LIGHT), mono=True)
    notes = (
        "After Ctrl-C, a kill or a full",
        "disk, the same command goes",
        "on from OUT.partial, to the",
        "same bytes.",
    )
    for n, words in enumerate(notes):
        c.text(30, top + 62 + n * 18, words, size=12.5, color=MUTED)
