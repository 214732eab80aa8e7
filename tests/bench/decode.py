"""Decoding: a few inputs times packed weights, beside a dense layer, bitsandbytes and the bytes.

    python tests/bench/decode.py [--threads 1] [--dtype float32] [--tokens 1,2,4,8]
    python tests/bench/decode.py --model DIR [--codebooks nf4,nf3,nf2] [--new-tokens 64]

The first multiplies with layers of two sizes: `dense` is torch's, `before` dequantizes rows and
multiplies with them, `ours` is `packed_product`, `bnb` is a Linear4bit of bitsandbytes, where that
can be imported. Every contestant walks over copies of its layer that no cache holds together, as
the layers of a model do, and is timed once a round, round after round, so that changes of the
machine meet all; medians of the rounds. `floor` is how long the bytes of the packed weight take at
the bandwidth that was measured beside them, on as many threads. The second generates text greedily
with a dense model and with artifacts of it (made on the way, or `--artifacts DIR,DIR`), once as it
is and once with `packed_product` dequantizing (`before`), and prints tokens a second. With one
thread all seconds are seconds of the processor, so that a busy machine counts less; with more they
pass on the wall. `--busy` runs other processes that compute without a pause.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.core import decode
from irq_convert.core.decode import MOST_TOKENS, packed_product
from irq_convert.core.product import tiled_product
from irq_convert.core.quantized import QuantizedTensor
from tests.core.oracle import random_sample

SIZES = ("576x1536", "4096x11008")
"""Outputs x inputs."""
OUT_OF_CACHE = 160 << 20
"""Bytes that the copies of a layer fill at least."""
SPIN = "while True: pass"


def bandwidth(threads: int) -> float:
    """Bytes a second at which torch reads memory: the best of a few sums and products."""
    numbers = torch.ones(OUT_OF_CACHE // 4)
    ways = (numbers.sum, lambda: numbers.dot(numbers), numbers.max)
    best = min(_seconds(way) for _ in range(5) for way in ways)
    return numbers.numel() * 4 / best


def now() -> float:
    """Seconds: of the processor where one thread computes, else as they pass."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _seconds(run: Callable[[], object]) -> float:
    begin = now()
    run()
    return now() - begin


class Layers:
    """Copies of a layer, walked over again and again."""

    def __init__(self, size: int, make: Callable[[], Any], multiply: Callable[..., object]) -> None:
        self.copies = [make() for _ in range(max(2, -(-OUT_OF_CACHE // size)))]
        self.multiply = multiply
        self.turns = itertools.cycle(self.copies)

    def seconds(self, x: torch.Tensor, least: float = 0.05) -> float:
        """Of one product: the mean of as many as fill `least` seconds."""
        begin, done = now(), 0
        while (passed := now() - begin) < least or done < 3:
            self.multiply(x, next(self.turns))
            done += 1
        return passed / done


def packed_bytes(q: QuantizedTensor) -> int:
    return sum(part.numel() * part.element_size() for part in q.parts().values())


def contestants(
    rows: int, cols: int, codebook: str, dtype: torch.dtype, bnb: Any
) -> dict[str, Layers]:
    """Each by its column."""
    q = random_sample(0, rows, cols, codebook).q
    dense = torch.randn(rows, cols, dtype=dtype)
    size = packed_bytes(q)
    found = {
        "dense": Layers(dense.numel() * dense.element_size(), dense.clone, functional.linear),
        "before": Layers(size, lambda: copy.deepcopy(q), tiled_product),
        "ours": Layers(size, lambda: copy.deepcopy(q), packed_product),
    }
    if bnb is not None and codebook == "nf4":

        def make() -> torch.nn.Module:
            layer = bnb.nn.Linear4bit(cols, rows, False, dtype, True, "nf4")
            layer.load_state_dict({"weight": dense})
            return layer.to("cpu")

        found["bnb"] = Layers(size, make, lambda x, layer: layer(x))
    return found


def layers(options: argparse.Namespace, bnb: Any) -> None:
    dtype = getattr(torch, options.dtype)
    speed = bandwidth(options.threads)
    print(
        f"{torch.get_num_threads()} threads, {options.busy} busy processes, {options.dtype}; "
        f"memory {speed / 1e9:.1f} GB/s; microseconds a product"
    )
    heads = ("dense", "before", "ours", "bnb", "floor")
    print(f"{'layer':>11} {'code':5}{'tok':>4}" + "".join(f"{head:>9}" for head in heads), end="")
    print(f"{'dense/ours':>12}{'ours/floor':>11}", flush=True)
    for size, codebook in itertools.product(options.sizes, options.codebooks):
        rows, cols = map(int, size.split("x"))
        who = contestants(rows, cols, codebook, dtype, bnb)
        floor = packed_bytes(who["ours"].copies[0]) / speed
        for tokens in options.tokens:
            x = torch.randn(tokens, cols, dtype=dtype)
            times: dict[str, list[float]] = {name: [] for name in who}
            for _ in range(options.rounds):
                for name, each in who.items():
                    times[name].append(each.seconds(x))
            mid = {name: statistics.median(each) for name, each in times.items()}
            mid["floor"] = floor
            cells = [f"{mid[head] * 1e6:9.1f}" if head in mid else f"{'':9}" for head in heads]
            print(f"{size:>11} {codebook:5}{tokens:>4}" + "".join(cells), end="")
            print(f"{mid['dense'] / mid['ours']:12.2f}{mid['ours'] / floor:11.2f}", flush=True)


def artifacts(options: argparse.Namespace, scratch: Path) -> Iterator[Path]:
    """Those that were named, or made of the model."""
    import irq_convert

    yield from map(Path, options.artifacts.split(",") if options.artifacts else ())
    for codebook in () if options.artifacts else options.codebooks:
        out = scratch / codebook
        more = options.embeddings
        irq_convert.quantize(options.model, out, codebook=codebook, include_embeddings=more)
        yield out


def models(options: argparse.Namespace) -> None:
    """Greedy text, dense and packed, in turns."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import irq_convert

    logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    who = {"dense": (dense, MOST_TOKENS)}
    with tempfile.TemporaryDirectory() as scratch:
        for out in artifacts(options, Path(scratch)):
            model = irq_convert.load(out, dtype=dtype).eval()
            who |= {f"{out.name} before": (model, {}), out.name: (model, MOST_TOKENS)}
    ids = torch.arange(100, 104)[None]

    def generate(model: Any, many: int) -> None:
        settings = {"do_sample": False, "min_new_tokens": many, "pad_token_id": 0}
        model.generate(ids, max_new_tokens=many, **settings)

    speeds: dict[str, list[float]] = {name: [] for name in who}
    for turn in range(options.rounds + 1):
        for name, (model, decode.MOST_TOKENS) in who.items():
            first = _seconds(partial(generate, model, 1))  # the prompt, which is not counted
            if turn:  # the one before warms up
                seconds = _seconds(partial(generate, model, 1 + options.new_tokens)) - first
                speeds[name].append(options.new_tokens / seconds)
    print(f"{torch.get_num_threads()} threads, {options.busy} busy processes, {options.dtype}")
    print(f"{'model':20}{'tokens/s':>10}{'/ dense':>9}")
    base = statistics.median(speeds["dense"])
    for name, found in speeds.items():
        middle = statistics.median(found)
        print(f"{name:20}{middle:10.1f}{middle / base:9.2f}", flush=True)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute without a pause."""
    started = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(processes)]
    try:
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--artifacts", default="", metavar="DIRS")
    parser.add_argument("--codebooks", default="nf4,nf3,nf2,int4,int3,int2")
    parser.add_argument("--sizes", default=",".join(SIZES), help="outputs x inputs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, metavar="PROCESSES")
    parser.add_argument("--embeddings", action="store_true", help="quantize them and the head too")
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    options.codebooks, options.sizes = options.codebooks.split(","), options.sizes.split(",")
    options.tokens = [int(each) for each in options.tokens.split(",")]
    torch.set_num_threads(options.threads)
    try:
        import bitsandbytes as bnb
    except ImportError:
        bnb = None
    with busy(options.busy), torch.no_grad():
        if options.model:
            models(options)
        else:
            layers(options, bnb)


if __name__ == "__main__":
    main()
