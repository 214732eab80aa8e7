"""Write every drawing of the documentation beside this script: `python docs/drawings/make.py`.

Nothing but Python is needed. The plots are drawn from the two JSON files here, whose figures stand
in docs/benchmarks.md too, with the commands that measured them.
"""

from __future__ import annotations

from pathlib import Path

import accuracy
import bits
import life
import memory
import pipeline

HERE = Path(__file__).resolve().parent
DRAWINGS = {
    "accuracy": accuracy.draw,
    "bits": bits.draw,
    "life": life.draw,
    "memory": memory.draw,
    "pipeline": pipeline.draw,
}


def main() -> None:
    for name, draw in DRAWINGS.items():
        draw().save(HERE / f"{name}.svg")


if __name__ == "__main__":
    main()
