"""The table of docs/models.md: `python -m tests.architectures.table` prints it.

Every row is made here and now: a tiny random model is quantized, loaded and compared with the dense
model of the decoded weights, saved, loaded again, and trained for one step.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from .journey import Result, run
from .zoo import KINDS, Kind

HEAD = (
    "architecture",
    "class",
    "weights of linears and experts in the files",
    "share quantized",
    "largest logit difference",
    "saved and loaded again",
    "LoRA step",
)
_EXPERTS = {
    "": "",
    "each": "a tensor for each expert",
    "stacked": "experts stacked `[E, out, in]`",
    "stacked, transposed": "experts stacked `[E, in, out]`",
}


def rows() -> Iterator[tuple[str, ...]]:
    """One row an architecture."""
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            yield _row(kind, run(kind, Path(folder)))


def _row(kind: Kind, result: Result) -> tuple[str, ...]:
    same = result.difference == 0
    return (
        kind.name,
        f"`{kind.model}`",
        "transposed" if kind.turned else _EXPERTS[kind.experts] or "plain",
        f"{result.report.share:.0%}",
        "0 (equal bits)" if same else f"{result.difference:.1e}",
        "equal" if result.reloaded else "DIFFERENT",
        f"{result.learned} of {result.adapters} adapters",
    )


def main() -> None:
    """Print the table in Markdown."""
    warnings.simplefilter("ignore")
    print("|".join(("", *HEAD, "")).replace("|", " | ").strip())
    print("|" + "---|" * len(HEAD))
    for row in rows():
        print(" | ".join(("", *row, "")).strip())


if __name__ == "__main__":
    main()
