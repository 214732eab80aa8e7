"""The life of a model: source, artifact, adapter, merged, exported, served."""

from __future__ import annotations

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
    TEAL,
    TEAL_LIGHT,
    VIOLET,
    VIOLET_LIGHT,
    Canvas,
)

EXPORTED = (
    ("dense", "16 or 32 bits", ("any program",)),
    ("mlx", "int2, int3, int4", ("mlx-lm",)),
    ("gguf", "Q4_1 of int codebooks", ("llama.cpp, Ollama",)),
    ("compressed-tensors", "integer zero points", ("transformers", "vLLM: 4 bits")),
)
MERGED = (
    ("irq", "an artifact again", ("transformers, vLLM", "load artifacts as they are")),
    ("dense", "16 or 32 bits", ("any program",)),
    ("adapter", "a plain LoRA", ("PEFT", "on artifact or dense model")),
)
MIDDLE, END = 592, 828
WIDTH, HEIGHT = 182, 46
ARTIFACT, ADAPTER = 147, 421
"""Heights of the two rows."""


def draw() -> Canvas:
    c = Canvas(1040, 560, "The life of a model in irq-convert, with the command of every step")
    for x, words in ((MIDDLE, "EXPORTED"), (END, "RUNS IN")):
        c.text(x, 36, words, size=11, color=MUTED, bold=True)
    lines: tuple[str, ...] = ("checkpoint", "folder or Hub id,", "safetensors or pickles")
    c.box(30, ARTIFACT - 38, 142, 76, lines)
    lines = ("artifact", "2, 3 or 4 bits a weight:", "codes, scales, taus,", "checksums")
    c.box(276, ARTIFACT - 49, 172, 98, lines, (BLUE, BLUE_LIGHT))
    c.line([(172, ARTIFACT), (273, ARTIFACT)], BLUE, arrow=True, weight=2)
    c.text(222, ARTIFACT - 9, "quantize", color=BLUE, anchor="middle", mono=True)
    c.text(276, 62, "inspect  verify  eval", color=BLUE, mono=True)
    c.text(276, 81, "show, check and measure it", size=11.5, color=MUTED)
    _exports(c)
    _training(c)
    _merges(c)
    c.text(30, 532, "push", color=INK, bold=True, mono=True)
    words = "sends any of these folders to the Hub, in one commit, with a model card"
    c.text(72, 532, words, size=12, color=MUTED)
    return c


def _exports(c: Canvas) -> None:
    tops = [52 + n * 58 for n in range(len(EXPORTED))]
    _fan(c, ARTIFACT, tops, TEAL, "export --to")
    for top, (name, what, runs) in zip(tops, EXPORTED, strict=True):
        c.box(MIDDLE, top, WIDTH, HEIGHT, (name, what), (TEAL, TEAL_LIGHT), mono=True)
        _runs(c, top, runs)


def _training(c: Canvas) -> None:
    lines: tuple[str, ...] = ("data", "text, instructions,", "conversations")
    c.box(30, ADAPTER - 38, 142, 76, lines)
    lines = ("adapter", "LoRA, IEC, statistics;", "the artifact under it", "stays as it is")
    c.box(276, ADAPTER - 49, 172, 98, lines, (AMBER, AMBER_LIGHT))
    c.line([(172, ADAPTER), (273, ADAPTER)], LINE, arrow=True)
    c.line([(318, ARTIFACT + 49), (318, ADAPTER - 52)], AMBER, arrow=True, weight=2)
    c.text(308, 290, "finetune", color=AMBER, anchor="end", mono=True)


def _merges(c: Canvas) -> None:
    c.text(MIDDLE, 322, "MERGED", size=11, color=MUTED, bold=True)
    tops = [336 + n * 62 for n in range(len(MERGED))]
    _fan(c, ADAPTER, tops, VIOLET, "merge --to")
    for top, (name, what, runs) in zip(tops, MERGED, strict=True):
        colors = (BLUE, BLUE_LIGHT) if name == "irq" else (VIOLET, VIOLET_LIGHT)
        c.box(MIDDLE, top, WIDTH, HEIGHT, (name, what), colors, mono=True)
        _runs(c, top, runs)
    turn = MIDDLE + 120
    back = [(turn, tops[0]), (turn, 296), (400, 296), (400, ARTIFACT + 52)]
    c.line(back, BLUE, dashed=True, arrow=True)
    c.text(412, 286, "export it, or train again", size=11.5, color=MUTED)


def _fan(c: Canvas, y: float, tops: list[int], color: str, command: str) -> None:
    c.fan((448, y), [(MIDDLE - 3, top + HEIGHT / 2) for top in tops], color, weight=1.75)
    c.text(505, y - 9, command, color=color, anchor="middle", mono=True)


def _runs(c: Canvas, top: float, lines: tuple[str, ...]) -> None:
    c.line([(MIDDLE + WIDTH, top + HEIGHT / 2), (END - 3, top + HEIGHT / 2)], GREY, arrow=True)
    c.box(END, top, WIDTH, HEIGHT, lines, (GREY, GREY_LIGHT))
