"""Memory and throughput of the whole command, on checkpoints of growing depth.

Run `python tests/bench/memory.py` (needs the extra `dev`, and about 12 GB of disk for the default
depths). For each depth a LLaMA with 7B shapes and random weights is written, `irq-convert quantize`
runs on it as a process of its own, and in turn with it a plain copy that reads the same files and
writes as many bytes as the artifact has. Peak memory is that of the process and its children; it
should neither leave the bound nor grow with the model.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from speed import describe_machine, number, spread, table

from irq_convert.errors import IrqError

COMMAND = (
    f"{shlex.quote(sys.executable)} -m irq_convert quantize {{source}} {{out}} --bits 4 --json"
)
ABOVE_TORCH_MB = 600
GROWTH = 0.05
CHUNK = 8 << 20
TINY = ("--layers", "1", "--hidden", "256", "--intermediate", "704", "--vocab", "320")


@dataclass(frozen=True)
class Usage:
    """One finished process: wall and processor seconds, peak resident bytes of its tree."""

    seconds: float
    cpu_seconds: float
    peak_rss: int


@dataclass
class Depth:
    """What was measured for one number of layers."""

    layers: int
    source_bytes: int
    artifact_bytes: int
    weights: int
    quantized_weights: int
    cached: float | None
    runs: list[Usage]
    copy_seconds: list[float]

    @property
    def seconds(self) -> list[float]:
        return [run.seconds for run in self.runs]

    @property
    def peak_rss(self) -> int:
        return max(run.peak_rss for run in self.runs)

    @property
    def gigabytes(self) -> float:
        """Read and written."""
        return (self.source_bytes + self.artifact_bytes) / 1e9

    @property
    def over_copy(self) -> list[float]:
        """Seconds of the command over those of the plain copy after it."""
        pairs = zip(self.seconds, self.copy_seconds, strict=True)
        return [whole / copy for whole, copy in pairs]


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and its descendants, shared pages counted in each."""
    total = 0
    try:
        root = psutil.Process(pid)
        for member in (root, *root.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def run_watched(command: Sequence[str], interval: float = 0.05) -> Usage:
    """Run `command` to its end; its own high-water mark is exact, that of a tree is sampled.

    Exits with what the command said when it fails.
    """
    done, sampled = threading.Event(), [0]

    def sample(pid: int) -> None:
        while not done.wait(interval):
            sampled[0] = max(sampled[0], tree_rss(pid))

    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        watcher = threading.Thread(target=sample, args=(process.pid,))
        watcher.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            seconds = time.perf_counter() - start
            done.set()
            watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            tail = said.read()[-2000:].decode(errors="replace").strip()
            sys.exit(f"{shlex.join(command)}: exit code {process.returncode}\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(sampled[0], used.ru_maxrss * unit)
    return Usage(seconds, used.ru_utime + used.ru_stime, peak)


def torch_rss() -> int:
    """Resident bytes of a fresh interpreter right after `import torch`."""
    code = "import torch, psutil; print(psutil.Process().memory_info().rss)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout)


def plain_copy(source: Path, target: Path, size: int) -> float:
    """Seconds to read the weight files of `source` and write `size` bytes into `target`, synced."""
    files = sorted(source.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    buffer = memoryview(bytearray(CHUNK))
    done = written = 0
    start = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    done += count
                    due = size * done // total - written
                    while due:  # an artifact can be larger than its source
                        due -= (step := out.write(buffer[: min(due, CHUNK)]))
                        written += step
        os.fsync(out.fileno())
    return time.perf_counter() - start


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_once(folder: Path) -> None:
    """Bring the weight files into the page cache, as far as there is room."""
    buffer = bytearray(CHUNK)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(folder: Path) -> None:
    """Drop the weight files from the page cache; they have to be on the disk already."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_part(folder: Path) -> float | None:
    """The part of the weight files that lies in the page cache, None where that is not known."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    present = pages = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view:
            flags = ctypes.create_string_buffer(-(-len(view) // mmap.PAGESIZE))
            first = ctypes.c_char.from_buffer(view)
            failed = libc.mincore(ctypes.addressof(first), len(view), flags)
            del first
            if failed:
                return None
            pages += len(flags)
            present += sum(flag & 1 for flag in flags.raw)
    return present / pages


def count_weights(source: Path, artifact: Path) -> tuple[int, int]:
    """Weights in the source, and how many of them the artifact holds as packed bytes."""
    from irq_convert.checkpoint.source import open_checkpoint

    before, after = open_checkpoint(source).tensors, open_checkpoint(artifact).tensors
    packed = [info for name, info in before.items() if name in after and after[name].dtype == "U8"]
    return sum(info.numel for info in before.values()), sum(info.numel for info in packed)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def make_source(folder: Path, *sizes: str) -> Path:
    script = Path(__file__).with_name("synthetic.py")
    command = [sys.executable, str(script), str(folder), *sizes]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        sys.exit(f"{folder}: the source could not be written")
    os.sync()
    return folder


@contextmanager
def scratch(where: Path | None, keep: bool) -> Iterator[Path]:
    """A temporary folder, removed at the end unless it is to be kept."""
    if where is not None:
        Path(where).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="irq-bench-", dir=where))
    try:
        yield folder
    finally:
        if keep:
            note(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def measure_depth(
    folder: Path, layers: int, command: Callable[[Path, Path], list[str]], args: argparse.Namespace
) -> Depth:
    """Write a source of `layers` layers, then run command and copy in turn, `--rounds` times."""
    note(f"{layers} layers: writing the source")
    source = make_source(folder / f"layers-{layers}", "--layers", str(layers))
    out, copy = folder / f"out-{layers}", folder / f"copy-{layers}"
    depth = Depth(layers, folder_bytes(source), 0, 0, 0, None, [], [])
    for turn in range(1, args.rounds + 1):
        note(f"{layers} layers: round {turn} of {args.rounds}")
        settle(source, args.cold)
        depth.cached = cached_part(source)
        depth.runs.append(run_watched(command(source, out)))
        depth.artifact_bytes = folder_bytes(out)
        depth.weights, depth.quantized_weights = count_weights(source, out)
        if not args.keep or turn < args.rounds:
            shutil.rmtree(out)
        settle(source, args.cold)
        depth.copy_seconds.append(plain_copy(source, copy, depth.artifact_bytes))
        copy.unlink()
    if not args.keep:
        shutil.rmtree(source)
    return depth


def settle(source: Path, cold: bool) -> None:
    """Give every run the same start: nothing left to write, the source cached or not at all."""
    os.sync()
    if cold:
        evict(source)
    else:
        read_once(source)


def depth_rows(depths: Sequence[Depth], torch_bytes: int) -> Iterator[list[str]]:
    """One line a quantity, one column a depth."""

    def line(name: str, cell: Callable[[Depth], str]) -> list[str]:
        return [name, *(cell(depth) for depth in depths)]

    yield line("source, GB", lambda d: f"{d.source_bytes / 1e9:.2f}")
    yield line("artifact, GB", lambda d: f"{d.artifact_bytes / 1e9:.2f}")
    yield line("peak RSS, MB", lambda d: f"{d.peak_rss / 1e6:.0f}")
    yield line(
        f"above import torch, MB (<= {ABOVE_TORCH_MB})",
        lambda d: f"{(d.peak_rss - torch_bytes) / 1e6:.0f}",
    )
    yield line("seconds", lambda d: number(statistics.median(d.seconds)))
    yield line("  range", lambda d: spread(d.seconds))
    yield line(
        "processor seconds", lambda d: number(statistics.median(run.cpu_seconds for run in d.runs))
    )
    yield line(
        "million quantized weights a second",
        lambda d: number(d.quantized_weights / statistics.median(d.seconds) / 1e6),
    )
    yield line(
        "GB/s read and written", lambda d: number(d.gigabytes / statistics.median(d.seconds))
    )
    yield line("plain copy, seconds", lambda d: number(statistics.median(d.copy_seconds)))
    yield line("  range", lambda d: spread(d.copy_seconds))
    yield line("command / plain copy", lambda d: number(statistics.median(d.over_copy)))
    yield line("  range", lambda d: spread(d.over_copy))
    yield line(
        "source in page cache at the start",
        lambda d: "unknown" if d.cached is None else f"{d.cached:.0%}",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16], help="default 4 16")
    parser.add_argument("--rounds", type=int, default=3, help="runs for each depth (default 3)")
    parser.add_argument("--dir", type=Path, help="where the temporary files go")
    parser.add_argument("--keep", action="store_true", help="keep the temporary files")
    parser.add_argument(
        "--cold", action="store_true", help="drop the source from the page cache before each run"
    )
    parser.add_argument(
        "--command", default=COMMAND, help="another command, with {source} and {out} in it"
    )
    parser.add_argument("--json", type=Path, help="write every number to this file")
    args = parser.parse_args(argv)
    if min(*args.layers, args.rounds) < 1:
        parser.error("counts must be positive")
    if args.cold and not hasattr(os, "posix_fadvise"):
        parser.error("--cold needs posix_fadvise, which this system lacks")
    return args


def show(depths: Sequence[Depth], report: dict[str, Any], args: argparse.Namespace) -> None:
    """Print everything in 80 columns."""
    machine, torch_bytes = report["machine"], report["torch_rss"]
    console = Console(width=80, highlight=False)
    console.print(f"{machine['processor']}, {machine['cores']} cores, load {machine['load']}")
    cache = "dropped from the page cache" if args.cold else "read once"
    console.print(f"before each run: files synced, source {cache}; kernels compiled")
    console.print(f"rounds: {args.rounds}, command and plain copy in turn; medians of them")
    first, again = report["tiny"]
    console.print(
        f"import torch alone: {torch_bytes / 1e6:.0f} MB; a tiny source: first run "
        f"{first['seconds']:.1f} s, then {again['seconds']:.1f} s, {again['peak_rss'] / 1e6:.0f} MB"
    )
    columns = ["", *(f"{depth.layers} layers" for depth in depths)]
    console.print(table("irq-convert quantize", columns, depth_rows(depths, torch_bytes)))
    for depth in depths[1:]:
        ratio = depth.peak_rss / depths[0].peak_rss
        met = "yes" if abs(ratio - 1) <= GROWTH else "no"
        console.print(
            f"peak RSS, {depth.layers} / {depths[0].layers} layers: {ratio:.3f} "
            f"(within {GROWTH:.0%}: {met})"
        )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)

    def command(source: Path, out: Path) -> list[str]:
        words = shlex.split(args.command)
        return [word.format(source=source, out=out) for word in words]

    machine = describe_machine(("torch", "numba", "numpy", "safetensors"))
    torch_bytes = torch_rss()
    with scratch(args.dir, args.keep) as folder:
        note("twice on a tiny source: kernels, then start-up alone")
        tiny = make_source(folder / "tiny", *TINY)
        starts = [run_watched(command(tiny, folder / f"tiny-out-{turn}")) for turn in (1, 2)]
        try:
            depths = [measure_depth(folder, layers, command, args) for layers in args.layers]
        except IrqError as error:
            sys.exit(f"error: {error}")
    report: dict[str, Any] = {
        "machine": machine,
        "cold": args.cold,
        "command": args.command.replace(sys.executable, "python"),
        "torch_rss": torch_bytes,
        "tiny": [asdict(start) for start in starts],
        "depths": [asdict(depth) for depth in depths],
    }
    show(depths, report, args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
