"""What is asked of a size: how large, by which text it is judged, and what the mix must keep to."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from irq_convert.core.codebook import WIDTHS, in_words
from irq_convert.errors import UsageError
from irq_convert.jobs.common.expressions import check_expression
from irq_convert.jobs.sizing.choices import DENSE_BITS

TOKENS, WINDOW = 16_384, 512
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*((?:[kmg]i?)?b)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """`"3.5GB"` to bytes; B is a byte, kB, MB and GB are powers of ten, KiB, MiB and GiB of two.

    Raises `UsageError` for anything else.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UsageError(f"--target-size {text!r}: write a size with its unit, as 3.5GB or 700MB")
    size = float(found[1]) * _UNITS[found[2].lower()]
    if not isfinite(size):
        raise UsageError(f"--target-size {text[:20]}...: no size has so many digits; ask for less")
    return int(size)


@dataclass(frozen=True)
class TargetOptions:
    """A size to reach, in one of two ways.

    `size`: bytes of the whole artifact; `bits`: of a weight that there is a choice for, with its
    share of scale and tau. `text` (as in `CalibrationOptions`), `tokens`, `window` (None: 512, at
    most the model's context and half the tokens) and `seed` say what the damage is measured on; one
    window in eight is held out and judges the mix. `file` keeps the sensitivities, and is read
    where it is there. `families` and `blocks` limit the choices, all of them where empty. `within`
    are expressions: weights in whose names one matches with the same groups get the same choice.
    `at_least` and `at_most` are pairs of an expression and a number of bits, 16 for weights left as
    they are; the last match wins. Raises `UsageError` for what cannot be.
    """

    size: int | None = None
    bits: float | None = None
    text: str | None = None
    tokens: int = TOKENS
    window: int | None = None
    seed: int = 0
    held_out: int = 8
    file: Path | None = None
    families: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    within: tuple[str, ...] = ()
    at_least: tuple[tuple[str, int], ...] = ()
    at_most: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if (self.size is None) == (self.bits is None):
            raise UsageError("give one of --target-size and --target-bits")
        if self.size is not None and self.size < 1:
            raise UsageError(f"--target-size {self.size}: nothing has so few bytes")
        if self.bits is not None and not 1 <= self.bits <= 32:
            raise UsageError(f"--target-bits {self.bits:g}: from 1 to 32")
        least = 2 if self.window is None else self.window
        if least < 2 or self.tokens < 2 * least:
            raise UsageError(
                f"--target-tokens {self.tokens}: at least two windows of {max(2, least)} tokens, "
                "one to measure and one to judge"
            )
        for pattern in self.within:
            check_expression("--uniform-within", pattern)
        for option, pairs in (("--at-least", self.at_least), ("--at-most", self.at_most)):
            for pattern, bits in pairs:
                check_expression(option, pattern)
                if bits not in (*WIDTHS, DENSE_BITS):
                    known = in_words([*map(str, WIDTHS), str(DENSE_BITS)])
                    raise UsageError(f"{option} {pattern!r} = {bits}: choose {known}")

    def to_dict(self) -> dict[str, Any]:
        """What decides the mix; the text is told by its hash elsewhere."""
        found = asdict(self)
        del found["text"], found["file"]
        for name in ("families", "blocks", "within", "at_least", "at_most"):
            found[name] = [list(each) if isinstance(each, tuple) else each for each in found[name]]
        return found
