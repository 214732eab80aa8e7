"""Peak memory of `merge --to dense` beside that of the converter, on artifacts of growing depth.

Run `python tests/bench/merge_memory.py` (needs the extra `dev`, and about 12 GB of disk for the
default depths). For each depth a LLaMA with 7B shapes and random weights is written, quantized by
`irq-convert quantize`, given an IEC adapter of random numbers on every linear layer, and merged by
`irq-convert merge --to dense --check layers`, each a process of its own. Peak memory is that of
the process; the merge should stay near the converter's, and neither should grow with the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memory import Usage, folder_bytes, make_source, note, run_watched, scratch, torch_rss
from rich.console import Console
from speed import describe_machine, number, table

KINDS = ("plain", "iec", "block")
GROWTH = 0.05


@dataclass
class Depth:
    """What was measured for one number of layers: the two commands, `--rounds` times each."""

    layers: int
    artifact_bytes: int
    adapter_bytes: int
    dense_bytes: int
    quantize: list[Usage]
    merge: list[Usage]

    def peak(self, which: str) -> int:
        runs: list[Usage] = getattr(self, which)
        return max(run.peak_rss for run in runs)

    def seconds(self, which: str) -> float:
        runs: list[Usage] = getattr(self, which)
        return statistics.median(run.seconds for run in runs)


def write_adapter(folder: Path, artifact: Path, kind: str, rank: int) -> None:
    """Random numbers for every quantized layer, in the layout of formats/irq-adapter-v1.md."""
    import torch
    from safetensors.torch import save_file

    from irq_convert.artifact.config import module_name
    from irq_convert.artifact.contents import open_artifact
    from irq_convert.artifact.identity import artifact_identity

    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for stored in open_artifact(artifact).quantized:
        shape, key = stored.shape, f"base_model.model.{module_name(stored.name)}"
        inputs = shape.blocks_per_row if kind == "block" else shape.cols
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        b = torch.randn(shape.rows, rank, generator=generator) * 1e-3
        tensors[f"{key}.lora_B.weight"] = b
        if kind != "plain":
            tensors[f"{key}.lora_iec_beta"] = torch.randn(2, generator=generator) * 1e-3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = {
        "peft_type": "LORA" if kind == "plain" else "IEC_LORA",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": r".*_proj",
        "base_sha256": artifact_identity(artifact),
    }
    if kind != "plain":
        settings |= {"connection": "both", "pool": "block" if kind == "block" else None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "irq_convert", *map(str, words), "--json"]


def measure_depth(folder: Path, layers: int, args: argparse.Namespace) -> Depth:
    """Write, quantize and merge one depth, and remove it again."""
    note(f"{layers} layers: writing the source")
    sizes = ["--layers", str(layers)]
    for name in ("hidden", "intermediate", "vocab"):
        if getattr(args, name) is not None:
            sizes += [f"--{name}", str(getattr(args, name))]
    source = make_source(folder / f"source-{layers}", *sizes)
    artifact, adapter, out = (folder / f"{n}-{layers}" for n in ("artifact", "adapter", "out"))
    quantize, merge = [], []
    for turn in range(1, args.rounds + 1):
        note(f"{layers} layers: round {turn} of {args.rounds}")
        quantize.append(run_watched(command("quantize", source, artifact, "--overwrite")))
        if not adapter.exists():
            write_adapter(adapter, artifact, args.kind, args.rank)
        words = ("merge", artifact, adapter, out, "--to", args.to, "--check", args.check)
        merge.append(run_watched(command(*words, "--overwrite", "--min-survival", "-1000")))
    sizes_out = folder_bytes(artifact), folder_bytes(adapter), folder_bytes(out)
    for made in (source, artifact, adapter, out):
        shutil.rmtree(made)
    return Depth(layers, *sizes_out, quantize, merge)


def show(depths: Sequence[Depth], torch_bytes: int, args: argparse.Namespace) -> None:
    """Print everything in 80 columns."""
    rows = []
    for name, cell in (
        ("artifact, GB", lambda d: f"{d.artifact_bytes / 1e9:.2f}"),
        ("adapter, GB", lambda d: f"{d.adapter_bytes / 1e9:.3f}"),
        ("result, GB", lambda d: f"{d.dense_bytes / 1e9:.2f}"),
        ("quantize: peak RSS, MB", lambda d: f"{d.peak('quantize') / 1e6:.0f}"),
        ("merge: peak RSS, MB", lambda d: f"{d.peak('merge') / 1e6:.0f}"),
        ("  of quantize's", lambda d: f"{d.peak('merge') / d.peak('quantize'):.3f}"),
        ("  above import torch, MB", lambda d: f"{(d.peak('merge') - torch_bytes) / 1e6:.0f}"),
        ("quantize: seconds", lambda d: number(d.seconds("quantize"))),
        ("merge: seconds", lambda d: number(d.seconds("merge"))),
    ):
        rows.append([name, *(cell(depth) for depth in depths)])
    console = Console(width=80, highlight=False)
    title = f"merge --to {args.to} --check {args.check}, {args.kind} adapter of rank {args.rank}"
    console.print(table(title, ["", *(f"{d.layers} layers" for d in depths)], rows))
    for depth in depths[1:]:
        for which in ("quantize", "merge"):
            ratio = depth.peak(which) / depths[0].peak(which)
            met = "yes" if ratio - 1 <= GROWTH else "no"
            console.print(
                f"{which}: peak RSS, {depth.layers} / {depths[0].layers} layers: {ratio:.3f} "
                f"(grows by at most {GROWTH:.0%}: {met})"
            )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16], help="default 4 16")
    for name in ("hidden", "intermediate", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="by default that of the 7B model")
    parser.add_argument("--rounds", type=int, default=1, help="runs for each depth (default 1)")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--kind", choices=KINDS, default="iec")
    parser.add_argument("--to", choices=("dense", "irq", "adapter"), default="dense")
    parser.add_argument("--check", choices=("layers", "none"), default="layers")
    parser.add_argument("--dir", type=Path, help="where the temporary files go")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    args = parser.parse_args(argv)
    if min(*args.layers, args.rounds, args.rank) < 1:
        parser.error("counts must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch_bytes = torch_rss()
    with scratch(args.dir, keep=False) as folder:
        depths = [measure_depth(folder, layers, args) for layers in args.layers]
    show(depths, torch_bytes, args)
    if args.json:
        report = {
            "machine": describe_machine(("torch", "numba", "numpy", "safetensors")),
            "torch_rss": torch_bytes,
            "depths": [asdict(depth) for depth in depths],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
