"""How fast a matrix is quantized: this package beside others, side by side in one run.

Run `python tests/bench/speed.py` (needs the extras `bench` and `dev`). Every contestant is timed
once a round, round after round, so that changes of the machine meet all of them; medians over the
rounds are printed, and ratios are medians of the ratio within a round. A busy machine still
flatters us with two threads and more, for the others enter and leave many short parallel regions
and wait at each end: quote numbers of an idle one. By default the weights are 4096 x 4096 bfloat16
drawn from a normal distribution; `--model` takes those of a checkpoint.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from irq_convert.errors import IrqError

if TYPE_CHECKING:
    import torch

    from irq_convert.core.spec import QuantSpec

BLOCK = 64
BUSY = 0.8
CODEBOOKS = ("nf4", "nf3", "nf2", "int4", "int3", "int2")
SEARCHES = (("none", 0), ("entropy", 0), ("mse", 0), ("entropy", 10))
OURS, PEER, AUTHORS, HQQ, FLOOR = "ours nf4", "bitsandbytes", "authors", "hqq", "floor"
MEANING = {
    OURS: "search, codes, packing",
    PEER: "quantize_4bit nf4, no search",
    AUTHORS: "201 x quantize_4bit + entropy",
    HQQ: "its optimizer, 4 bit, group 64",
    FLOOR: "read, write as much as ours",
}
RATIOS = {
    f"{OURS} / {PEER}": ("<=", 1.0),
    f"{AUTHORS} / {OURS}": (">=", 1000.0),
    f"{HQQ} / {OURS}": ("", 0.0),
    f"{OURS} / {FLOOR}": ("", 0.0),
}


@dataclass(frozen=True)
class Case:
    """One contestant: `run` quantizes `weights` weights."""

    name: str
    run: Callable[[], object]
    weights: int


@dataclass
class Report:
    """All that was measured; times are nanoseconds a weight, one for each round.

    `cpu_times` add up all threads: less sensitive to a busy machine, but threads that spin while
    they wait count too, so compare them with `--threads 1`.
    """

    machine: dict[str, Any]
    options: dict[str, Any]
    weights: str
    first_call_s: float
    compiled: bool
    times: dict[str, list[float]] = field(default_factory=dict)
    cpu_times: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Processor time of our main row over its seconds times threads; 1 on an idle machine."""
        pairs = zip(self.cpu_times[OURS], self.times[OURS], strict=True)
        return statistics.median(cpu / wall for cpu, wall in pairs) / self.options["threads"]

    @property
    def ratios(self) -> dict[str, list[float]]:
        """The ratios of `RATIOS`, round by round, where both sides were measured."""
        found = {}
        for name in RATIOS:
            top, bottom = name.split(" / ")
            if top in self.times and bottom in self.times:
                pairs = zip(self.times[top], self.times[bottom], strict=True)
                found[name] = [a / b for a, b in pairs]
        return found


def describe_machine(packages: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to place the numbers: processor, cores, load and versions."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "system": platform.platform(),
        "processor": model,
        "cores": os.cpu_count(),
        "load": load,
        "versions": found,
    }


def ours(tensors: Sequence[torch.Tensor], spec: QuantSpec, threads: int) -> Callable[[], object]:
    """The whole of `quantize_tensor` for every tensor."""
    from irq_convert.core.quantize import quantize_tensor

    return lambda: [quantize_tensor(w, spec, threads=threads) for w in tensors]


def bitsandbytes(tensors: Sequence[torch.Tensor]) -> Callable[[], object]:
    """NF4 as QLoRA stores it: absmax only, the statistics quantized in turn."""
    from bitsandbytes.functional import quantize_4bit

    def run(weight: torch.Tensor) -> object:
        return quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")

    return lambda: [run(w) for w in tensors]


def authors(sample: torch.Tensor) -> Callable[[], object]:
    """The published search, 201 candidates a block, on top of bitsandbytes.

    `sample` is flat, a whole number of blocks. tau = median + f * max|w - median| for 201 values of
    f, evenly spaced in +-0.1 sigma with sigma = 1 / ppf(0.9677083) = 0.54109; each candidate
    quantizes the shifted weights and the highest entropy of the codes wins, the first of equals.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    steps = torch.linspace(-0.1, 0.1, 201) * 0.54109
    one = torch.ones(1, 1)

    def code_entropy(packed: torch.Tensor) -> torch.Tensor:
        pairs = packed.view(-1, BLOCK // 2)
        codes = torch.cat([pairs >> 4, pairs & 15], 1).long()
        counts = torch.zeros(len(pairs), 16).scatter_add_(1, codes, one.expand(codes.shape))
        return torch.special.entr(counts / BLOCK).sum(1)

    def run() -> object:
        blocks = sample.view(-1, BLOCK).float()
        median = blocks.median(1, keepdim=True).values
        reach = (blocks - median).abs().amax(1, keepdim=True)
        best, tau = torch.full((len(blocks),), -1.0), median.clone()
        for step in steps:
            shift = median + step * reach
            packed, _ = quantize_4bit(blocks - shift, blocksize=BLOCK, quant_type="nf4")
            entropy = code_entropy(packed)
            better = entropy > best
            best = torch.where(better, entropy, best)
            tau = torch.where(better[:, None], shift, tau)
        codes = quantize_4bit(
            blocks - tau, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        offset = tau.mean()
        return codes, quantize_blockwise(tau.flatten() - offset, blocksize=256), offset

    return run


def hqq(tensors: Sequence[torch.Tensor]) -> Callable[[], object]:
    """HQQ's own optimizer with its defaults, on the CPU."""
    import torch
    from hqq.core.quantize import Quantizer

    options: dict[str, Any] = {"nbits": 4, "group_size": BLOCK, "axis": 1, "device": "cpu"}
    options["compute_dtype"] = torch.float32
    return lambda: [Quantizer.quantize(w, **options) for w in tensors]


def floor(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Callable[[], object]:
    """Read every byte of the weights once and write `sizes` bytes: the least any method does."""
    import torch

    def touch(weight: torch.Tensor, size: int) -> object:
        raw = weight.view(-1).view(torch.uint8)
        head, rest = raw[:size], raw[size // 8 * 8 : len(raw) // 8 * 8]
        return torch.empty(size, dtype=torch.uint8).copy_(head), rest.view(torch.int64).sum()

    return lambda: [touch(w, size) for w, size in zip(tensors, sizes, strict=True)]


def model_weights(folder: Path, limit: int) -> list[torch.Tensor]:
    """Whole matrices of the checkpoint, embeddings and heads apart, until `limit` weights."""
    from irq_convert.checkpoint.reader import TileReader
    from irq_convert.checkpoint.source import open_checkpoint

    found: list[torch.Tensor] = []
    count = 0
    with TileReader() as reader:
        for name, info in open_checkpoint(folder).tensors.items():
            plain = info.dtype in ("F16", "BF16", "F32") and len(info.shape) == 2
            if not plain or any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
                continue
            if info.numel % BLOCK or (found and count + info.numel > limit):
                continue
            found.append(reader.read_tensor(info))
            count += info.numel
    if not found:
        sys.exit(f"{folder}: no matrix whose size is a multiple of {BLOCK}")
    return found


def first_call(threads: int) -> tuple[float, bool]:
    """Seconds of the first call, and whether it had to compile the kernels."""
    import torch

    from irq_convert.core.kernels.quantize import quantize_tile
    from irq_convert.core.spec import QuantSpec

    tiny = torch.randn(8, BLOCK)
    run = ours([tiny], QuantSpec(), threads)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, not quantize_tile.stats.cache_hits


def make_cases(
    tensors: Sequence[torch.Tensor], args: argparse.Namespace, skipped: dict[str, str]
) -> list[Case]:
    """The contestants in the order they run; what cannot be imported goes to `skipped`."""
    import torch

    from irq_convert.core.quantize import quantize_tensor
    from irq_convert.core.spec import QuantSpec

    total = sum(w.numel() for w in tensors)
    stored = [quantize_tensor(w, threads=args.threads).parts() for w in tensors]
    sizes = [sum(part.nbytes for part in parts.values()) for parts in stored]
    sample = torch.cat([w.flatten() for w in tensors])[: args.authors_weights // BLOCK * BLOCK]
    contest: dict[str, tuple[Callable[[], Callable[[], object]], int]] = {
        OURS: (lambda: ours(tensors, QuantSpec(), args.threads), total),
        PEER: (lambda: bitsandbytes(tensors), total),
        FLOOR: (lambda: floor(tensors, sizes), total),
        HQQ: (lambda: hqq(tensors), total),
        AUTHORS: (lambda: authors(sample), sample.numel()),
    }
    cases = []
    for name, (make, weights) in contest.items():
        if name in args.skip:
            skipped[name] = "left out on request"
            continue
        try:
            cases.append(Case(name, make(), weights))
        except ImportError as error:
            skipped[name] = f"{error}: pip install 'irq-convert[bench]'"
    for codebook in () if "variants" in args.skip else CODEBOOKS:
        for objective, refine in SEARCHES:
            spec = QuantSpec(codebook, BLOCK, objective, refine)
            name = variant_name(codebook, objective, refine)
            if name != OURS:
                cases.append(Case(name, ours(tensors, spec, args.threads), total))
    return cases


def variant_name(codebook: str, objective: str, refine: int) -> str:
    """The key of one of our own rows; plain `ours nf4` is the default search."""
    extra = "" if objective == "entropy" else f" {objective}"
    return f"ours {codebook}{extra}" + (f" refine {refine}" if refine else "")


def measure(report: Report, cases: Sequence[Case], rounds: int) -> None:
    """Fill in the times: one untimed round, then `rounds` timed ones."""
    for number in range(rounds + 1):
        for case in cases:
            if sys.stderr.isatty():
                label = f"round {number} of {rounds}: {case.name}"
                print(f"\r{label:<60}", end="\r", file=sys.stderr, flush=True)
            gc.collect()
            start, cpu_start = time.perf_counter_ns(), time.process_time_ns()
            case.run()
            wall, cpu = time.perf_counter_ns() - start, time.process_time_ns() - cpu_start
            if number:
                report.times.setdefault(case.name, []).append(wall / case.weights)
                report.cpu_times.setdefault(case.name, []).append(cpu / case.weights)


def number(value: float) -> str:
    """Three significant digits, thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    return f"{number(min(values))} - {number(max(values))}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Rows under `columns`; all but the first column are aligned to the right."""
    made = Table(*columns, title=title, title_justify="left")
    for at, column in enumerate(made.columns):
        column.justify, column.no_wrap = "right" if at else "left", True
    for row in rows:
        made.add_row(*row)
    return made


def contest_rows(report: Report) -> Iterator[list[str]]:
    """ns a weight of every contestant, with the fastest and slowest round."""
    for name, meaning in MEANING.items():
        if name in report.times:
            values = report.times[name]
            yield [name, number(statistics.median(values)), spread(values), meaning]


def ratio_rows(report: Report) -> Iterator[list[str]]:
    """Ratios within a round, against what the project aims at."""
    for name, (sense, target) in RATIOS.items():
        if name in report.ratios:
            values = report.ratios[name]
            middle = statistics.median(values)
            met = middle <= target if sense == "<=" else middle >= target
            verdict = [f"{sense} {target:,.0f}", "yes" if met else "no"] if sense else ["", ""]
            yield [name, number(middle), spread(values), *verdict]


def variant_rows(report: Report) -> Iterator[list[str]]:
    """Median ns a weight of every codebook under every search."""
    for codebook in CODEBOOKS:
        names = [variant_name(codebook, objective, refine) for objective, refine in SEARCHES]
        yield [codebook, *(number(statistics.median(report.times[name])) for name in names)]


def show(report: Report, console: Console) -> None:
    """Print everything in 80 columns."""
    machine, options = report.machine, report.options
    how = "kernels compiled" if report.compiled else "kernels from the cache on disk"
    busy = report.share < BUSY
    warning = ": busy machine, preliminary" if busy else ""
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, load average {machine['load']}",
        f"{report.weights}; {options['threads']} threads, {options['rounds']} rounds",
        f"first call {report.first_call_s:.2f} s ({how})",
        f"ours had {report.share:.0%} of its threads' processor time{warning}",
        *(f"{name}: {reason}" for name, reason in report.skipped.items()),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)
    heads = ["", "median", "range"]
    console.print(table("ns per weight", [*heads, "what it does"], contest_rows(report)))
    console.print(table("ratios", [*heads, "target", "met"], ratio_rows(report)))
    if "variants" not in options["skip"]:
        searches = [f"{name}, refine {rounds}" if rounds else name for name, rounds in SEARCHES]
        rows = variant_rows(report)
        console.print(table("ours, ns per weight", ["codebook", *searches], rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="for everyone (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="timed repetitions (default 7)")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096, help=f"a multiple of {BLOCK}")
    parser.add_argument("--model", type=Path, help="a checkpoint to take whole matrices from")
    parser.add_argument(
        "--authors-weights",
        type=int,
        default=256 * 4096,
        help="how many weights the slow search gets (default 1048576)",
    )
    parser.add_argument(
        "--skip",
        nargs="*",
        default=[],
        choices=[PEER, AUTHORS, HQQ, FLOOR, "variants"],
        help="leave these out",
    )
    parser.add_argument("--cold", action="store_true", help="compile into an empty kernel cache")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    args = parser.parse_args(argv)
    if min(args.threads, args.rounds, args.rows, args.cols) < 1 or args.cols % BLOCK:
        parser.error(f"counts must be positive and --cols a multiple of {BLOCK}")
    if args.authors_weights < BLOCK:
        parser.error(f"--authors-weights must be at least {BLOCK}")
    return args


def limit_threads(threads: int) -> None:
    """Give every library the same threads; the variables count only before the first import."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)


def run(args: argparse.Namespace) -> Report:
    """Measure and return the numbers; nothing is printed but progress."""
    machine = describe_machine(("torch", "numba", "numpy", "bitsandbytes", "hqq"))
    limit_threads(args.threads)
    import torch

    seconds, compiled = first_call(args.threads)
    if args.model is None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(args.rows, args.cols, generator=generator) * 0.02
        tensors = [normal.bfloat16()]
        what = f"weights {args.rows} x {args.cols}, normal * 0.02, bfloat16"
    else:
        tensors = model_weights(args.model, args.rows * args.cols)
        count = sum(w.numel() for w in tensors)
        what = f"weights of {args.model.name}: {len(tensors)} matrices, {count:,} weights"
    options = {**vars(args), "model": args.model and args.model.name, "json": None}
    report = Report(machine, options, what, seconds, compiled)
    with torch.inference_mode():
        cases = make_cases(tensors, args, report.skipped)
        measure(report, cases, args.rounds)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as cache:
        if args.cold:
            os.environ["NUMBA_CACHE_DIR"] = cache
        try:
            report = run(args)
        except IrqError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
    show(report, Console(width=80))
    if args.json:
        parts = {"times": report.times, "cpu_times": report.cpu_times, "ratios": report.ratios}
        medians = {
            f"median_{key}": {name: statistics.median(rounds) for name, rounds in part.items()}
            for key, part in parts.items()
        }
        derived = {"ratios": report.ratios, "share": report.share, **medians}
        whole = {**asdict(report), **derived}
        args.json.write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
