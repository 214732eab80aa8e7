"""How much of what quantizing lost do adapters win back: held-out loss, several seeds.

Run `python tests/bench/recovery.py --model DIR --text FILE`. The model is quantized at each width
with and without ICQ; on each result adapters are trained on the first part of the text and
measured on the last tenth. Every variant sees the same batches in the same order under one seed, so
differences between variants are differences of pairs. Rows end up in `--json FILE` as they come.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

HELD_OUT = 0.9
VARIANTS = {
    "NF + LoRA": ("none", "none", None),
    "ICQ + LoRA": ("entropy", "none", None),
    "NF + IEC": ("none", "both", None),
    "ICQ + IEC": ("entropy", "both", None),
    "ICQ + block-pooled": ("entropy", "both", "block"),
}
PAIRS = (
    ("ICQ + LoRA", "NF + LoRA"),
    ("NF + IEC", "NF + LoRA"),
    ("ICQ + IEC", "ICQ + LoRA"),
    ("ICQ + IEC", "NF + LoRA"),
    ("ICQ + block-pooled", "ICQ + IEC"),
)


@dataclass(frozen=True)
class Row:
    """One training run: losses in nats a token on the held-out text."""

    bits: int
    variant: str
    seed: int
    before: float
    after: float
    train: float
    seconds: float


def windows_of(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out windows, int64 `[n, context]`."""
    from irq_convert.hf.causal_lm import load_tokenizer
    from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text, split_text

    tokenizer = load_tokenizer(options.model)
    parts = split_text(read_text(options.text), HELD_OUT)
    cut = [
        [w for w in cut_windows(encode_stream(tokenizer, part), options.context) if len(w) == size]
        for part, size in zip(parts, (options.context,) * 2, strict=True)
    ]
    return torch.stack(cut[0]), torch.stack(cut[1])[: options.eval_windows]


def loss_of(model: Any, windows: torch.Tensor) -> float:
    """Mean loss a token in float32."""
    total = 0.0
    model.eval()
    with torch.no_grad():
        for window in windows:
            total += float(model(input_ids=window[None], labels=window[None]).loss)
    return total / len(windows)


def train(model: Any, windows: torch.Tensor, seed: int, options: argparse.Namespace) -> float:
    """AdamW at a constant rate after a short warm-up; returns the loss of the last tenth."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(1000 + seed)
    losses = []
    model.train()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (step + 1) / 10)
        batch = windows[torch.randint(0, len(windows), (options.batch,), generator=generator)]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return statistics.fmean(losses[-max(1, options.steps // 10) :])


def base_of(folder: Path, bits: int, objective: str, options: argparse.Namespace) -> Path | str:
    """The artifact at `bits` with `objective`, made on first use; 16 bits is the source itself."""
    from irq_convert.core.spec import QuantSpec
    from irq_convert.jobs.quantize.options import QuantizeOptions
    from irq_convert.jobs.quantize.quantize import quantize

    if bits == 16:
        return options.model
    out = folder / f"{options.codebook}{bits}-{objective}"
    if not out.exists():
        spec = QuantSpec(f"{options.codebook}{bits}", 32 if options.small_blocks else 64, objective)
        quantize(options.model, out, QuantizeOptions(spec))
    return out


def run(
    folder: Path,
    bits: int,
    variant: str,
    seed: int,
    data: Any,
    known: dict[tuple[int, str], float],
    options: argparse.Namespace,
) -> Row:
    """Quantize, attach, train, measure; `known` are losses before training, by base."""
    import irq_convert
    from irq_convert.hf.causal_lm import load_causal_lm

    objective, connection, pool = VARIANTS[variant]
    begun = time.perf_counter()
    base = load_causal_lm(base_of(folder, bits, objective, options))
    before = known.get((bits, objective))
    if before is None:
        before = known[bits, objective] = loss_of(base, data[1])
    torch.manual_seed(seed)
    config = irq_convert.IecLoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        connection=connection,
        pool=pool,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = irq_convert.attach(base, config)
    trained = train(model, data[0], seed, options)
    after = loss_of(model, data[1])
    return Row(bits, variant, seed, before, after, trained, time.perf_counter() - begun)


def mean_and_error(values: Sequence[float]) -> str:
    """`mean ± standard error`."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.fmean(values):.4f} ± {_error(values):.4f}"


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def report(rows: Sequence[Row]) -> None:
    """Two tables: losses, and differences of pairs under one seed."""
    console = Console(width=100)
    table = Table(title="held-out loss, nats a token")
    for name in ("bits", "variant", "before", "after", "seeds"):
        table.add_column(name, justify="right" if name != "variant" else "left")
    for bits in dict.fromkeys(row.bits for row in rows):
        for variant in VARIANTS:
            mine = [row for row in rows if (row.bits, row.variant) == (bits, variant)]
            if mine:
                after = mean_and_error([row.after for row in mine])
                table.add_row(str(bits), variant, f"{mine[0].before:.4f}", after, str(len(mine)))
    console.print(table)
    table = Table(
        title="difference of held-out loss after training, same seed (negative is better)"
    )
    for name in ("bits", "pair", "difference"):
        table.add_column(name, justify="right" if name != "pair" else "left")
    for bits in dict.fromkeys(row.bits for row in rows):
        for first, second in PAIRS:
            found = {(r.variant, r.seed): r.after for r in rows if r.bits == bits}
            seeds = [s for v, s in found if v == first and (second, s) in found]
            if seeds:
                values = [found[first, s] - found[second, s] for s in seeds]
                table.add_row(str(bits), f"{first} - {second}", mean_and_error(values))
    console.print(table)


def main() -> None:
    """Run all, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4, 3, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--eval-windows", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--codebook", default="nf", choices=("nf", "int"))
    parser.add_argument("--small-blocks", action="store_true", help="blocks of 32, not 64")
    parser.add_argument("--bfloat16", action="store_true", help="train under autocast")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = windows_of(options)
    rows: list[Row] = []
    known: dict[tuple[int, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for bits in options.bits:
                for variant in options.variants:
                    if bits == 16 and variant not in ("NF + LoRA", "NF + IEC"):
                        continue
                    rows.append(run(Path(folder), bits, variant, seed, data, known, options))
                    print(rows[-1], flush=True)
                    if options.json:
                        kept = {"options": {k: str(v) for k, v in vars(options).items()}}
                        kept |= {"rows": [asdict(row) for row in rows]}
                        options.json.write_text(json.dumps(kept, indent=1))
    report(rows)


if __name__ == "__main__":
    main()
