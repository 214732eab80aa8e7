"""How fast a GPU quantizes and dequantizes, and whether its bytes are those of the CPU.

Run `python tests/bench/gpu.py --json gpu.json` on a machine with a GPU (the extra `bench` brings
bitsandbytes). It prints tables in Markdown, for docs/gpu.md, with the device's name. Bandwidth
counts bytes read and written once, beside the device's own rate for copying a gigabyte.
`--checkpoint FOLDER` (see synthetic.py) also times a whole conversion against reading its files.
Times are medians; the device is waited for around each run.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from irq_convert.core.backends import resolve_backend
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.nn.function import packed_linear
from tests.bench.gpu_parts import Clock, Row, describe, differing, normal, stored_bytes
from tests.bench.gpu_solver import same_weighted, solving, weighted

GIB = 1 << 30
BLOCK = 64
SPECS = tuple(
    QuantSpec(codebook, BLOCK, objective)
    for codebook in ("nf4", "nf3", "nf2", "int4")
    for objective in ("none", "entropy", "mse")
)
EXACT = (
    *SPECS,
    QuantSpec("nf4", 16),
    QuantSpec("nf3", 1024, "mse", 5),
    QuantSpec("int4", 64, "entropy", 5),
    QuantSpec("int4", 64, "entropy", 5, "integer"),
    QuantSpec("int2", 32, "mse", 0, "integer"),
)
LAYERS = 32
SOLVED, SMALL = ((4096, 4096), (4096, 11008)), ((64, 200), (32, 256))
LAYER_7B = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)


def copy_rate(clock: Clock, size: int) -> float:
    """Bytes read and written a second by a plain copy of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * size / clock.seconds(lambda: target.copy_(source))


def bandwidth(clock: Clock, size: int, copied: float) -> Iterator[Row]:
    """Quantize and dequantize one square matrix under every search."""
    weight = normal(size, size, clock.device)
    dense = torch.empty_like(weight)
    for spec in SPECS:
        q = quantize_tensor(weight, spec)
        moved = weight.nbytes + stored_bytes(q)
        there = clock.seconds(lambda: quantize_tensor(weight, spec))  # noqa: B023
        back = clock.seconds(lambda: dequantize_tensor(q, torch.bfloat16, out=dense))  # noqa: B023
        cells = [describe(spec)]
        for seconds in (there, back):
            rate = moved / seconds
            each = seconds / weight.numel() * 1e9
            cells += [f"{each:.3g}", f"{rate / 1e9:,.0f}", f"{rate / copied:.1%}"]
        yield tuple(cells)


def products(clock: Clock, tokens: Sequence[int], size: tuple[int, int]) -> Iterator[Row]:
    """A layer's forward pass, and forward with backward, against its dense weight."""
    weight = normal(*size, clock.device)
    q = quantize_tensor(weight)
    for many in tokens:
        x = normal(many, size[1], clock.device, 1)
        y = normal(many, size[0], clock.device, 2)

        def step(multiply: Callable[[torch.Tensor], torch.Tensor]) -> None:
            asked = x.detach().requires_grad_()  # noqa: B023
            multiply(asked).backward(y)  # noqa: B023

        def packed(inputs: torch.Tensor) -> torch.Tensor:
            return packed_linear(inputs, q)

        def plain(inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(inputs, weight)

        with torch.no_grad():
            forward = [clock.seconds(lambda m=m, x=x: m(x)) for m in (packed, plain)]
        both = [clock.seconds(lambda m=m: step(m)) for m in (packed, plain)]
        yield (str(many), *(f"{1e3 * t:.3g}" for t in (*forward, *both)))


def whole_model(clock: Clock, layers: int, shapes: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """All linears of a 7B model: on the device, from host memory, and with bitsandbytes.

    The weights of one layer stand for those of all.
    """
    matrices = [normal(rows, cols, clock.device, i) for i, (rows, cols) in enumerate(shapes)]
    pinned = clock.device.type == "cuda"
    on_host = [m.cpu().pin_memory() if pinned else m.cpu() for m in matrices]
    total = layers * sum(m.numel() for m in matrices)

    def every(run: Callable[[torch.Tensor], object], source: Sequence[torch.Tensor]) -> float:
        for matrix in source:
            run(matrix.to(clock.device))
        return clock.once(
            lambda: [
                run(m.to(clock.device, non_blocking=True)) for _ in range(layers) for m in source
            ]
        )

    for spec in (QuantSpec("nf4"), QuantSpec("nf4", BLOCK, "mse"), QuantSpec("nf3")):
        for where, source in (("device", matrices), ("host", on_host)):
            seconds = every(lambda w: quantize_tensor(w, spec), source)  # noqa: B023
            yield f"{describe(spec)}, from the {where}", f"{total / 1e9:.2f}", f"{seconds:.3f}"
    try:
        from bitsandbytes.functional import quantize_4bit
    except Exception as error:  # not installed, or without a build for this CUDA
        yield "bitsandbytes nf4", f"{total / 1e9:.2f}", f"not usable ({first_line(error)})"
        return

    def peer(weight: torch.Tensor) -> object:
        return quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")

    for where, source in (("device", matrices), ("host", on_host)):
        label = f"bitsandbytes nf4 (no search), from the {where}"
        try:
            cell = f"{every(peer, source):.3f}"
        except RuntimeError as error:
            cell = f"failed ({first_line(error)})"
        yield label, f"{total / 1e9:.2f}", cell


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def equality(device: torch.device, size: tuple[int, int]) -> Iterator[Row]:
    """Bytes of the device against those of the CPU kernels, with tails and outliers."""
    weight = normal(*size, torch.device("cpu"), 7)
    weight[0, 0], weight[-1, -1] = 3.0, -40.0
    weight[3], weight[5, :BLOCK] = 0.0, 0.25
    for spec in EXACT:
        ours = quantize_tensor(weight.to(device), spec)
        there = quantize_tensor(weight, spec, backend="numba")
        wrong, total = differing(ours, there)
        dense = dequantize_tensor(ours).cpu().view(torch.int32)
        values = int((dense != dequantize_tensor(there).view(torch.int32)).sum())
        yield describe(spec), f"{wrong:,} of {total:,}", f"{values:,} of {weight.numel():,}"


def conversion(folder: Path, device: str) -> Iterator[Row]:
    """A whole conversion against reading its files once, both with what the disk cache holds."""
    from irq_convert.jobs.quantize.options import QuantizeOptions
    from irq_convert.jobs.quantize.quantize import quantize

    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    start = time.perf_counter()
    buffer = memoryview(bytearray(8 << 20))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    reading = time.perf_counter() - start
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        target = Path(out) / "artifact"
        report = quantize(str(folder), target, QuantizeOptions(device=device))
    for name, seconds in (("read the files", reading), ("convert", report.seconds)):
        yield name, f"{size / 1e9:.2f}", f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}"


def markdown(title: str, heads: Row, rows: Sequence[Row]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])


def machine(device: torch.device) -> dict[str, str]:
    found = {
        "device": "the CPU (a check of this script)",
        "backend": "",
        "torch": torch.__version__,
    }
    found["backend"] = resolve_backend("auto", device)
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["memory_gib"] = f"{torch.cuda.get_device_properties(device).total_memory / GIB:.0f}"
    for name in ("triton", "bitsandbytes"):
        try:
            found[name] = __import__(name).__version__
        except Exception as error:
            missing = isinstance(error, ImportError)
            found[name] = "not installed" if missing else f"not usable ({first_line(error)})"
    return found | {"python": platform.python_version()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu checks the script")
    parser.add_argument("--size", type=int, default=8192, help="side of the square matrix")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of the 7B model")
    parser.add_argument("--small", action="store_true", help="tiny shapes everywhere")
    parser.add_argument("--rounds", type=int, default=7, help="timed repetitions (default 7)")
    parser.add_argument("--checkpoint", type=Path, help="time a conversion of this folder too")
    parser.add_argument("--json", type=Path, help="write every table to this file")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> Iterator[tuple[str, Row, list[Row]]]:
    """Title, heads and rows of every table, each as soon as it is measured."""
    device = torch.device(args.device)
    clock = Clock(device, args.rounds)
    size, copy = (256, 1 << 20) if args.small else (args.size, GIB)
    layer, shapes = ((512, 256), ((256, 256), (512, 256)))
    if not args.small:
        layer, shapes = (11008, 4096), LAYER_7B
    copied = copy_rate(clock, copy)
    yield (
        f"bandwidth, {size} x {size} bf16; a copy moves {copied / 1e9:,.0f} GB/s",
        ("search", "quantize ns/weight", "GB/s", "of copy", "dequantize ns/weight", "GB/s",
         "of copy"),
        list(bandwidth(clock, size, copied)),
    )  # fmt: skip
    yield (
        f"a layer {layer[0]} x {layer[1]}, bf16, ms",
        ("tokens", "forward", "dense", "forward + backward", "dense"),
        list(products(clock, (1, 16, 2048), layer)),
    )
    yield (
        f"all linears of a 7B model ({args.layers} layers)",
        ("what", "billion weights", "seconds"),
        list(whole_model(clock, args.layers, shapes)),
    )
    yield (
        "differences from the CPU kernels",
        ("search", "stored bytes", "dequantized values"),
        list(equality(device, (260, 1100))),
    )
    yield (
        f"the search weighed by importance, {size} x {size} bf16",
        ("search", "plain ns/weight", "weighted ns/weight", "ratio"),
        list(weighted(clock, size)),
    )
    yield (
        "differences from the CPU kernels, weighed by importance",
        ("search", "stored bytes"),
        list(same_weighted(device, (260, 1100))),
    )
    yield (
        "a matrix solved for its inputs, scale and tau and codes",
        ("search", "shape", "seconds", "seconds on the CPU", "codes that differ", "loss / CPU's"),
        list(solving(clock, SMALL if args.small else SOLVED)),
    )
    if args.checkpoint:
        heads = ("", "GB", "seconds", "GB/s")
        rows = list(conversion(args.checkpoint, args.device))
        yield f"conversion of {args.checkpoint.name}", heads, rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA GPU here, so there is nothing to measure")
    about: dict[str, Any] = machine(torch.device(args.device))
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n", flush=True)
    listed: dict[str, Any] = {}
    for title, heads, rows in measure(args):
        print(markdown(title, heads, rows), flush=True)
        listed[title] = {"heads": heads, "rows": rows}
        if args.json:
            args.json.write_text(json.dumps({"machine": about, "tables": listed}, indent=2) + "\n")


if __name__ == "__main__":
    main()
