"""Products in bfloat16 and float32 on this CPU: torch's dense layer beside a packed one.

    python tests/bench/half_on_cpu.py [--rows 1024 --cols 2816] [--tokens 64] [--rounds 5]

Milliseconds on one thread, seconds of the processor, medians of rounds in which all take turns;
forward, and the gradient of the input alone. Where torch has no instructions for a dtype
(`core/working_dtype.py`), packed layers go through float32: `torch's own` is the same packed layer
that does not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.core import working_dtype
from irq_convert.nn.function import packed_linear
from tests.core.oracle import random_sample

cpu_multiplies = working_dtype.cpu_multiplies


def main() -> None:
    asked = _parse()
    torch.set_num_threads(1)
    q = random_sample(0, asked.rows, asked.cols, asked.codebook).q
    able = {str(dtype)[6:]: cpu_multiplies(dtype) for dtype in (torch.bfloat16, torch.float16)}
    print(f"{asked.tokens} tokens, {asked.rows} x {asked.cols}; torch says it is good at {able}")
    print(f"{'dtype':9}{'who':14}{'forward':>10}{'gradient':>10}   ms")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(asked.tokens, asked.cols, dtype=dtype, requires_grad=True)
        dense = torch.randn(asked.rows, asked.cols, dtype=dtype)
        who: dict[str, tuple[Callable[[], torch.Tensor], bool | None]] = {
            "dense": (lambda x=x, dense=dense: functional.linear(x, dense), None),
            "packed": (lambda x=x: packed_linear(x, q), None),
            "torch's own": (lambda x=x: packed_linear(x, q), True),
        }
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in who}
        for _ in range(asked.rounds):
            for name, (forward, able_as) in who.items():
                times[name].append(_seconds(forward, able_as))
        for name, found in times.items():
            ahead, back = (1e3 * statistics.median(each) for each in zip(*found, strict=True))
            print(f"{str(dtype)[6:]:9}{name:14}{ahead:10.1f}{back:10.1f}", flush=True)


def _seconds(forward: Callable[[], torch.Tensor], able: bool | None) -> tuple[float, float]:
    """Of a forward pass and of the gradient; `able` is what a CPU is said to be."""
    if able is not None:
        working_dtype.cpu_multiplies = lambda dtype: able
    try:
        begin = time.process_time()
        y = forward()
        middle = time.process_time()
        y.backward(torch.ones_like(y))
        return middle - begin, time.process_time() - middle
    finally:
        working_dtype.cpu_multiplies = cpu_multiplies


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--cols", type=int, default=2816)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codebook", default="nf4")
    return parser.parse_args()


if __name__ == "__main__":
    main()
