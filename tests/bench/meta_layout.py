"""Meta's layout beside safetensors: memory that does not grow with depth, and throughput.

Run `python tests/bench/meta_layout.py` (needs the extra `dev`, and about 16 GB of disk): a LLaMA
with 13B shapes and random weights is written in two files as Meta cuts them, and once more as
safetensors; `irq-convert quantize --bits 3` runs on both in turn, each a process of its own. Bytes
of the two artifacts have to be the same. `--hidden` and `--intermediate` make it smaller.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from memory import Usage, folder_bytes, note, run_watched, torch_rss
from rich.console import Console
from speed import describe_machine, table

from irq_convert.checkpoint.planned_folder import copied
from irq_convert.checkpoint.reader import TileReader
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.checkpoint.writer import ShardWriter, TensorSpec

PARTS, VOCAB = 2, 32000


def write_meta(folder: Path, layers: int, hidden: int, intermediate: int) -> None:
    """Slices of every matrix in `PARTS` files; weights are views of one random block, cut anew."""
    pool = torch.randn(64 << 20).mul_(0.02).bfloat16()
    head = hidden // PARTS
    shapes = {"tok_embeddings": (VOCAB, head), "output": (VOCAB // PARTS, hidden)}
    for layer in range(layers):
        name = f"layers.{layer}."
        shapes |= {f"{name}attention.w{part}": (head, hidden) for part in "qkv"}
        shapes[f"{name}attention.wo"] = (hidden, head)
        shapes |= {f"{name}feed_forward.w{n}": (intermediate // PARTS, hidden) for n in (1, 3)}
        shapes[f"{name}feed_forward.w2"] = (hidden, intermediate // PARTS)
    norms = [f"layers.{at}.{part}_norm" for at in range(layers) for part in ("attention", "ffn")]
    folder.mkdir(parents=True)
    for part in range(PARTS):
        state = {}
        for number, (name, (rows, cols)) in enumerate(shapes.items()):
            size = rows * cols
            start = (number * 7919 + part * 104729) * 64 % (pool.numel() - 1)
            many = -(-(start + size) // pool.numel())
            state[f"{name}.weight"] = (
                pool.repeat(many)[start : start + size].view(rows, cols).clone()
            )
        state |= {f"{name}.weight": torch.ones(hidden).bfloat16() for name in (*norms, "norm")}
        torch.save(state, folder / f"consolidated.{part:02}.pth")
    params = {"dim": hidden, "n_layers": layers, "n_heads": hidden // 128, "norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))


def write_twin(source: Path, folder: Path) -> None:
    """The same model as safetensors, in files of about 2 GB, through our own reader."""
    checkpoint = open_checkpoint(source)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    infos, weight_map, number = list(checkpoint.tensors.values()), {}, 0
    while infos:
        taken = [infos.pop(0)]
        while infos and sum(info.nbytes for info in taken) < 2e9:
            taken.append(infos.pop(0))
        number += 1
        name = f"model-{number:05}.safetensors"
        specs = [TensorSpec(info.name, info.dtype, info.shape) for info in taken]
        with ShardWriter(folder / name, specs, {"format": "pt"}) as writer, TileReader() as reader:
            for info in taken:
                for at, data, _ in copied(reader, info):
                    writer.write(info.name, data, at)
        weight_map |= {info.name: name for info in taken}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantize(source: Path, out: Path) -> Usage:
    """One run of the command, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    line = f"{shlex.quote(sys.executable)} -m irq_convert quantize {source} {out} --bits 3 --json"
    return run_watched(shlex.split(line))


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two artifacts have the same weight files."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    return names == sorted(path.name for path in other.glob("*.safetensors")) and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names
    )


def measure(work: Path, layers: int, args: argparse.Namespace, base: int) -> list[str]:
    """One row: peak memory above torch's own, seconds, their ratio, and whether bytes agree."""
    source, twin = work / f"Llama-2-{layers}", work / "twin"
    note(f"writing {layers} layers")
    # By another process: a child's peak counts what its parent held when it was made.
    sizes = ("--hidden", str(args.hidden), "--intermediate", str(args.intermediate))
    line = [sys.executable, __file__, "--write", str(work), "--layers", str(layers), *sizes]
    subprocess.run(line, check=True)
    ours: list[Usage] = []
    theirs: list[Usage] = []
    for number in range(args.repeat):
        note(f"{layers} layers, run {number + 1}")
        ours.append(quantize(source, work / "ours"))
        theirs.append(quantize(twin, work / "theirs"))
    ratio = statistics.median(a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True))
    row = [
        str(layers),
        f"{folder_bytes(source) / 1e9:.2f}",
        *(f"{(max(use.peak_rss for use in runs) - base) / 1e6:.0f}" for runs in (ours, theirs)),
        *(f"{statistics.median(use.seconds for use in runs):.1f}" for runs in (ours, theirs)),
        f"{ratio:.2f}",
        "yes" if same_bytes(work / "ours", work / "theirs") else "NO",
    ]
    for folder in (source, twin, work / "ours", work / "theirs"):
        shutil.rmtree(folder)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=13824)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where to write; by default the system's")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.write is not None:
        source = args.write / f"Llama-2-{args.layers[0]}"
        write_meta(source, args.layers[0], args.hidden, args.intermediate)
        write_twin(source, args.write / "twin")
        return
    console = Console()
    console.print(describe_machine(["torch"]))
    base = torch_rss()
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        rows = [measure(Path(name), layers, args, base) for layers in args.layers]
    heads = ["layers", "GB", "MB", "MB twin", "s", "s twin", "ratio", "same bytes"]
    console.print(table("Meta's layout in two files, and its twin in safetensors", heads, rows))
    console.print(f"MB: peak memory above the {base / 1e6:.0f} MB of a process with torch.")


if __name__ == "__main__":
    main()
