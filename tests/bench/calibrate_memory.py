r"""Peak memory of `quantize --calibrate` on 7B layer shapes, as the number of layers grows.

    python tests/bench/calibrate_memory.py --layers 4 12 --tokens 4096
    python tests/bench/calibrate_memory.py --layers 4 12 --hidden 1024 --intermediate 2816 \
        --target-bits 3

With --target-bits of a target instead: what measures, chooses, judges and writes a mix. Random
weights and a text of random words: memory does not know the difference. Layers of 7B shapes take
minutes each on two cores.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from rich.console import Console
from speed import describe_machine, table

from tests.bench.memory import make_source, run_watched, torch_rss
from tests.jobs.calibration.words import write_word_tokenizer

VOCABULARY = 32_000
MOST_MB, GROWTH = 3_500, 0.05


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--target-bits", type=float)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--scratch", type=Path, help="where to write; by default the system's")
    args = parser.parse_args(argv)
    console = Console()
    console.print(describe_machine(["torch"]))
    base = torch_rss()
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        peaks = [_measure(Path(name), layers, args) for layers in args.layers]
    rows = [
        [str(layers), f"{seconds:.0f}", f"{peak / 1e6:,.0f}"]
        for layers, (seconds, peak) in zip(args.layers, peaks, strict=True)
    ]
    title = "--bits 3 --calibrate" if args.target_bits is None else "--target-bits"
    console.print(table(f"quantize {title}", ["layers", "seconds", "peak, MB"], rows))
    console.print(f"{base / 1e6:.0f} MB are those of a process with torch.")
    growth = max(peak for _, peak in peaks) / min(peak for _, peak in peaks) - 1
    held = growth <= GROWTH and max(peak for _, peak in peaks) <= MOST_MB * 1e6
    console.print(f"growth {growth:.1%} (<= {GROWTH:.0%}, all <= {MOST_MB:,} MB: {held})")


def _measure(scratch: Path, layers: int, args: argparse.Namespace) -> tuple[float, int]:
    sizes = {"--layers": layers, "--hidden": args.hidden, "--intermediate": args.intermediate}
    words = [str(part) for pair in (sizes | {"--vocab": VOCABULARY}).items() for part in pair]
    source = make_source(scratch / f"layers-{layers}", *words)
    write_word_tokenizer(source, VOCABULARY)
    text, draw = scratch / "text.txt", random.Random(0)
    text.write_text(" ".join(f"w{draw.randrange(VOCABULARY)}" for _ in range(args.tokens)))
    out = scratch / f"out-{layers}"
    options = f"--bits 3 --calibrate {text} --calibration-tokens {args.tokens}"
    if args.target_bits is not None:
        options = f"--target-bits {args.target_bits} --target-text {text} "
        options += f"--target-tokens {args.tokens}"
    command = (
        f"{shlex.quote(sys.executable)} -m irq_convert quantize {source} {out} {options} --json"
    )
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    usage = run_watched([*shlex.split(command), *threads])
    shutil.rmtree(source)
    shutil.rmtree(out)
    out.with_name(f"{out.name}.sensitivity.safetensors").unlink(missing_ok=True)
    return usage.seconds, usage.peak_rss


if __name__ == "__main__":
    main()
