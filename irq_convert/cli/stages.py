"""Progress in words, for work whose own bars are drawn by a library below."""

from __future__ import annotations

import sys

from irq_convert.jobs.progress import Progress


class Stages(Progress):
    """Prints each stage on stderr, where that is a terminal."""

    def stage(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"irq-convert: {text}", file=sys.stderr)

    def note(self, text: str) -> None:
        print(f"irq-convert: {text}", file=sys.stderr)
