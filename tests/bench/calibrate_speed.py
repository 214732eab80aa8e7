"""How long calibrating takes beside GPTQModel, one after the other in one run, and the floor.

    python tests/bench/calibrate_speed.py MODEL --text C4 --peer-python GPTQ/bin/python

Every round runs `irq-convert quantize --bits 3 --codebook int --calibrate` as a command, start and
imports and files included, then `peers.py gptqmodel --fast` with that interpreter, which times its
quantizing alone, without the error grid that takes it many times as long. Medians over the rounds,
and the median ratio within a round. The floor is the products that no such loop can spare, at the
rate of the machine's own matmul: the tokens twice through every layer, in the source and in the
quantized model, and their moments H and C.
For LLaMA's shapes: four inputs a layer. Leave the machine alone meanwhile. GPTQModel works on the
modules of a layer in threads of its own; two of torch's in each of them made it slower here. With
--give-up it is stopped after so many seconds, and the ratio is below the one printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from rich.console import Console
from speed import describe_machine, table

PEERS = Path(__file__).resolve().with_name("peers.py")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peer-python", help="interpreter of an environment with gptqmodel")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-threads", type=int, default=1, help="of torch, beside its own")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--give-up", type=int, help="seconds after which the peer is stopped")
    asked = parser.parse_args(argv)
    console = Console()
    console.print(describe_machine(["torch"]))
    operations = _operations(asked.model, asked.tokens)
    floor = operations / _rate(asked.threads)
    times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(asked.rounds):
            times.append((_ours(asked, Path(scratch, f"ours-{number}")), _peer(asked, scratch)))
    ours, peer = (statistics.median(column) for column in zip(*times, strict=True))
    least = "" if asked.give_up is None or peer < asked.give_up else "more than "
    rows = [["ours, the whole command", f"{ours:.0f}"]]
    rows.append(["GPTQModel, quantizing", f"{least}{peer:.0f}"])
    rows.append([f"floor, {operations / 1e12:.1f} Tflop", f"{floor:.0f}"])
    console.print(table(f"{asked.bits} bits, {asked.tokens:,} tokens", ["", "seconds"], rows))
    ratio = statistics.median(a / b for a, b in times)
    less = "less than " if least else ""
    console.print(f"ours / GPTQModel {less}{ratio:.2f} (<= 1), ours / floor {ours / floor:.2f}")


def _operations(model: Path, tokens: int) -> float:
    """Of both passes through the linears and of both moments, two a product and sum."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    rows = width * (heads + 2 * (config.get("num_key_value_heads") or heads))
    linears = hidden * rows + hidden * width * heads + 3 * hidden * inner
    moments = 2 * hidden**2 + (width * heads) ** 2 + inner**2
    return 2.0 * tokens * config["num_hidden_layers"] * (2 * linears + 2 * moments)


def _rate(threads: int) -> float:
    """Operations a second of a float32 product, the best of some: the machine at its best."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(12):
        begun = time.perf_counter()
        a @ b
        best = max(best, 2 * 2048**3 / (time.perf_counter() - begun))
    return best


def _ours(asked: argparse.Namespace, out: Path) -> float:
    command = (
        f"-m irq_convert quantize {shlex.quote(str(asked.model))} {out} --bits {asked.bits} "
        f"--codebook int --calibrate {shlex.quote(str(asked.text))} --json "
        f"--calibration-tokens {asked.tokens} --calibration-window {asked.window} "
        f"--threads {asked.threads}"
    )
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, *shlex.split(command)], check=True, capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": str(asked.threads)},
    )  # fmt: skip
    return time.perf_counter() - begun


def _peer(asked: argparse.Namespace, scratch: str) -> float:
    if asked.peer_python is None:
        return float("nan")
    command = [
        asked.peer_python, str(PEERS), "gptqmodel", str(asked.model.resolve()), f"{scratch}/peer",
        "--text", str(asked.text.resolve()), "--bits", str(asked.bits),
        "--tokens", str(asked.tokens), "--window", str(asked.window), "--fast",
    ]  # fmt: skip
    try:
        found = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=scratch,  # it leaves logs
            env=os.environ | {"OMP_NUM_THREADS": str(asked.peer_threads)}, timeout=asked.give_up,
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        return stopped.timeout
    said = re.search(r"gptqmodel .*: (\d+) s", found.stdout)
    if said is None:
        raise SystemExit(f"{PEERS.name} did not say how long it took: {found.stdout[-500:]}")
    return float(said[1])


if __name__ == "__main__":
    main()
