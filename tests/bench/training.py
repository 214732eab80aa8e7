"""Time and memory of a training step: IEC-LoRA beside LoRA, and beside bitsandbytes with PEFT.

Run `python tests/bench/training.py` (needs the extras `bench` and `dev`). The base has the shapes
of a 7B LLaMA, a few layers of it, random weights; every contestant has rank 64 on all linear layers
and sees the same tokens. Steps are taken in turns, so that changes of the machine meet all; medians
over the rounds are printed, and ratios are medians of the ratio within a round. Peak memory is the
RSS of a process of its own for each contestant while it takes two steps; building is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

CONTESTANTS = {
    "ours, IEC": "IecLoraConfig",
    "ours, block-pooled IEC": 'IecLoraConfig(pool="block")',
    "ours, scale and tau": 'IecLoraConfig(r=0, statistics="both")',
    "ours, tau": 'IecLoraConfig(r=0, statistics="tau")',
    "ours, no connection": 'IecLoraConfig(connection="none")',
    "ours, LoRA of PEFT": "LoraConfig on our artifact",
    "bitsandbytes, LoRA of PEFT": "LoraConfig on Linear4bit nf4, double quantization",
    "dense, LoRA of PEFT": "LoraConfig on nn.Linear",
}
RATIOS = (
    ("ours, IEC", "ours, LoRA of PEFT"),
    ("ours, IEC", "ours, no connection"),
    ("ours, block-pooled IEC", "ours, LoRA of PEFT"),
    ("ours, scale and tau", "ours, LoRA of PEFT"),
    ("ours, tau", "ours, LoRA of PEFT"),
    ("ours, IEC", "bitsandbytes, LoRA of PEFT"),
    ("ours, LoRA of PEFT", "bitsandbytes, LoRA of PEFT"),
    ("ours, IEC", "dense, LoRA of PEFT"),
)


def build(name: str, options: argparse.Namespace) -> nn.Module:
    """The model of a contestant, ready to train."""
    from peft import LoraConfig, get_peft_model

    import irq_convert
    from irq_convert.adapters.register import register

    register()
    model = _base(name.split(",")[0], options)
    shared: dict[str, Any] = {
        "r": options.rank,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "lora_dropout": options.dropout,
        "task_type": "CAUSAL_LM",
    }
    if "LoRA of PEFT" in name:
        config = LoraConfig(**shared)
    elif "tau" in name:
        moved = "both" if "scale" in name else "tau"
        config = irq_convert.IecLoraConfig(**shared | {"r": 0, "statistics": moved})
    elif "block" in name:
        config = irq_convert.IecLoraConfig(pool="block", **shared)
    else:
        connection = "none" if "no connection" in name else "both"
        config = irq_convert.IecLoraConfig(connection=connection, **shared)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return get_peft_model(model, config).train()


def _base(kind: str, options: argparse.Namespace) -> nn.Module:
    """A LLaMA whose linear layers become the kind's one after another: memory stays bounded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128,
        vocab_size=1024,
        dtype=options.dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = torch.randn(module.weight.shape) * 0.02
            model.set_submodule(name, _layer(kind, weight, dtype))
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight = nn.Parameter(torch.randn(module.weight.shape, dtype=dtype))
        elif hasattr(module, "weight"):
            module.weight = nn.Parameter(torch.ones(options.hidden, dtype=dtype))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
    return model


def _layer(kind: str, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    from irq_convert import QuantSpec, quantize_tensor
    from irq_convert.nn.linear import IrqLinear

    if kind == "ours":
        return IrqLinear.from_quantized(quantize_tensor(weight, QuantSpec("nf4", objective="none")))
    rows, cols = weight.shape
    if kind == "dense":
        dense = nn.Linear(cols, rows, bias=False, dtype=dtype)
        dense.weight.data = weight.to(dtype)
        return dense
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(cols, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    layer.weight = Params4bit(weight, requires_grad=False, **options)
    return layer.to("cpu")


def make_step(model: nn.Module, options: argparse.Namespace) -> Callable[[], float]:
    """One forward and backward pass and a step of the optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, 1024, (options.batch, options.tokens))

    def step() -> float:
        begun = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun

    return step


def peak(name: str, options: argparse.Namespace) -> float:
    """Peak RSS of a contestant in MB while it steps, in a new process."""
    arguments = [f"--{key}={value}" for key, value in vars(options).items() if key in _SHAPE]
    done = subprocess.run(
        [sys.executable, __file__, "--peak-of", name, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def _print_peak(options: argparse.Namespace) -> None:
    import bitsandbytes  # noqa: F401  (everybody pays for the same imports)
    import peft  # noqa: F401

    model = build(options.peak_of, options)
    _reset_peak()  # building passes through dense weights: a peak of its own
    step = make_step(model, options)
    for _ in range(2):
        step()
    print(_peak_rss())


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")


def _peak_rss() -> float:
    with open("/proc/self/status") as file:  # noqa: PTH123
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


_SHAPE = ("layers", "hidden", "intermediate", "rank", "tokens", "batch")
_SHAPE += ("dtype", "dropout", "threads")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), help="names to run")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        _print_peak(options)
        return
    names = [name for name in CONTESTANTS if name in options.only]
    steps = {name: make_step(build(name, options), options) for name in names}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(steps[name]())
    steps.clear()
    memory = {} if options.no_memory else {name: peak(name, options) for name in names}
    report(options, times, memory)


def report(
    options: argparse.Namespace, times: dict[str, list[float]], memory: dict[str, float]
) -> None:
    """Print tables, or JSON."""
    ratios = {
        f"{top} / {bottom}": [a / b for a, b in zip(times[top], times[bottom], strict=True)]
        for top, bottom in RATIOS
        if top in times and bottom in times
    }
    if options.json:
        shape = {key: getattr(options, key) for key in _SHAPE}
        print(json.dumps({"options": shape, "times": times, "peak_mb": memory, "ratios": ratios}))
        return
    console = Console()
    table = Table(title=f"{options.layers} layers, {options.batch} x {options.tokens} tokens")
    for column in ("", "s a step", "lowest", "peak MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, values in times.items():
        peak_mb = f"{memory[name]:.0f}" if name in memory else ""
        table.add_row(name, f"{statistics.median(values):.3f}", f"{min(values):.3f}", peak_mb)
    console.print(table)
    table = Table()
    for column in ("ratio of step times", "median", "lowest", "highest"):
        table.add_column(column, justify="right" if column != "ratio of step times" else "left")
    for name, values in ratios.items():
        row = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)


if __name__ == "__main__":
    main()
