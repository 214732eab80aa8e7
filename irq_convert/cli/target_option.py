"""`--target-size`, `--target-bits` and what goes with them, as `quantize` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from irq_convert.errors import UsageError

if TYPE_CHECKING:
    from irq_convert.jobs.sizing.options import TargetOptions

TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Size of the whole artifact, as 3.5GB: each weight gets the bits that serve best.",
    ),
]
TargetBits = Annotated[
    float | None,
    typer.Option(help="The same by bits of a quantized weight, scale and tau with it, as 2.75."),
]
TargetText = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="With a target: text to measure on (as --calibrate, whose text is the default; else "
        "the model writes one).",
    ),
]
TargetTokens = Annotated[
    int | None,
    typer.Option(
        help="With a target: most tokens to measure on, in windows of 512.  \\[default: 16384]"
    ),
]
SensitivityOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="With a target: keep what was measured here, or use what is.  "
        "\\[default: OUT.sensitivity.safetensors]",
    ),
]
UniformWithin = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        help="With a target: weights that match with the same groups share a choice; repeatable.",
    ),
]
AtLeast = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX=BITS", help="With a target: no fewer bits; 16 keeps a weight."),
]
AtMost = Annotated[
    list[str] | None, typer.Option(metavar="REGEX=BITS", help="With a target: no more bits.")
]


def target_options(
    size: str | None,
    bits: float | None,
    text: str | None,
    tokens: int | None,
    file: Path | None,
    within: list[str] | None,
    at_least: list[str] | None,
    at_most: list[str] | None,
) -> TargetOptions | None:
    """What the options ask for; None without a target.

    Raises `UsageError` for options of a target without one, and as `TargetOptions` does.
    """
    from irq_convert.jobs.sizing.options import TOKENS, TargetOptions, parse_size

    if size is None and bits is None:
        given = {
            "--target-text": text, "--target-tokens": tokens, "--sensitivity": file,
            "--uniform-within": within, "--at-least": at_least, "--at-most": at_most,
        }  # fmt: skip
        for option, value in given.items():
            if value:
                raise UsageError(f"{option} goes with --target-size or --target-bits: give one")
        return None
    return TargetOptions(
        size=None if size is None else parse_size(size),
        bits=bits,
        text=text,
        tokens=TOKENS if tokens is None else tokens,
        file=file,
        within=tuple(within or ()),
        at_least=tuple(rule("--at-least", each) for each in at_least or ()),
        at_most=tuple(rule("--at-most", each) for each in at_most or ()),
    )


def rule(option: str, text: str) -> tuple[str, int]:
    """`"down_proj=4"` as an expression and a number; `UsageError` naming `option` otherwise."""
    pattern, found, number = text.rpartition("=")
    if not found or not pattern or not (number.isascii() and number.isdigit()):
        raise UsageError(f"{option} {text!r}: write REGEX=BITS, as in 'down_proj=4'")
    return pattern, int(number)
