"""Integer codebooks by path: entropy, error, perplexity and KL divergence on several models.

    python -m tests.bench.integer_paths [--max-tokens 6000] [--json FILE]

For the demo's model, and the two stories models where they are, every linear inside the layers
is quantized to int4, int3 and int2 and decoded in place: plain min-max, the authors' search over
101 ranges in our own words (real-valued scales, integer zero points, zero always in the range), and
each objective of ours with float and with integer zero points, 8-bit scales, as it is stored. KL is
against the source, in nats. This table decides what `--codebook int` does by default.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))

from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_with_stats
from irq_convert.core.spec import QuantSpec
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text, split_text
from irq_convert.jobs.demo import MODEL_DIR
from irq_convert.jobs.demo.corpus import heldout
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from tests.paths import SHARED

BLOCK = 64
RANGES = torch.cat([torch.ones(1), torch.linspace(1, 1.1, 51)[1:], torch.linspace(1, 0.9, 51)[1:]])


@dataclass(frozen=True)
class Sums:
    """Weights, bits of all codes, squared error and energy: of a matrix, or of several."""

    weights: int = 0
    bits: float = 0.0
    error: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Sums(*(one + two for one, two in pairs))


Search = Callable[[torch.Tensor, int], tuple[torch.Tensor, Sums]]


@dataclass(frozen=True)
class Row:
    """One variant on one model: bits a code, squared error over energy, nats."""

    model: str
    bits: int
    variant: str
    entropy: float
    error: float
    perplexity: float
    kl: float
    kl_se: float
    top1: float


def ours(objective: str, zero_point: str, refine: int = 0) -> Search:
    """What `quantize_tensor` stores, decoded."""

    def search(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, Sums]:
        spec = QuantSpec(f"int{bits}", BLOCK, objective, refine, zero_point)
        packed, s = quantize_with_stats(weight, spec)
        sums = Sums(s.weights, s.entropy * s.weights, s.squared_error, s.energy)
        return dequantize_tensor(packed), sums

    return search


def authors(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, Sums]:
    """Both ends of each block's range, which holds zero, times p; ties keep what came first."""
    last, (rows, cols) = (1 << bits) - 1, weight.shape
    many = -(-cols // BLOCK)
    blocks = functional.pad(weight, (0, many * BLOCK - cols)).view(-1, BLOCK)
    inside = functional.pad(torch.ones(rows, cols), (0, many * BLOCK - cols)).view(-1, BLOCK).bool()
    low, high = blocks.amin(1).clamp(max=0), blocks.amax(1).clamp(min=0)
    flat = (low == 0) & (high == 0)
    low, high = low.masked_fill(flat, -1), high.masked_fill(flat, 1)
    best = torch.full((len(blocks),), -1.0)
    values = torch.empty_like(blocks)
    for p in RANGES.tolist():
        step = p * (high - low) / last
        zero = torch.round(-p * low / step)
        codes = (torch.round(blocks / step[:, None]) + zero[:, None]).clamp_(0, last)
        bits_held = _entropy(codes, inside, last)
        better = bits_held > best
        best = torch.where(better, bits_held, best)
        found = (codes - zero[:, None]) * step[:, None]
        values = torch.where(better[:, None], found, values)
    held = inside.sum(1)
    dense = values.view(rows, -1)[:, :cols].contiguous()
    error, energy = float((dense - weight).square().sum()), float(weight.square().sum())
    return dense, Sums(weight.numel(), float((best * held).sum()), error, energy)


def _entropy(codes: torch.Tensor, inside: torch.Tensor, last: int) -> torch.Tensor:
    """Bits a code of each block."""
    counts = torch.stack([((codes == k) & inside).sum(1) for k in range(last + 1)])
    share = counts / inside.sum(1)
    return -(share * share.log2()).nan_to_num(0.0).sum(0)


VARIANTS: dict[str, Search] = {
    "plain min-max": ours("none", "float"),
    "authors' 101 ranges": authors,
    "entropy": ours("entropy", "float"),
    "entropy, refine 10": ours("entropy", "float", 10),
    "mse": ours("mse", "float"),
    "plain, integer zero": ours("none", "integer"),
    "entropy, integer zero": ours("entropy", "integer"),
    "mse, integer zero": ours("mse", "integer"),
}


def measure(folder: Path, text: str, context: int, most: int) -> Iterator[Row]:
    """Every width and variant on the model in `folder`."""
    tokens = encode_stream(load_tokenizer(str(folder)), text, most)
    windows = cut_windows(tokens, context)
    source, model = load_causal_lm(str(folder)), load_causal_lm(str(folder))
    options = EvalOptions(context=context)
    base = evaluate_windows(source, windows, options)
    print(f"\n{folder.name}: {base.tokens} tokens, dense perplexity {base.perplexity:.3f}")
    print(f"{'':5}{'':24}{'entropy':>9}{'error':>10}{'perplexity':>12}{'KL, nats':>19}{'top-1':>7}")
    layers = [
        (part, original.weight.detach().float())
        for (name, part), original in zip(model.named_modules(), source.modules(), strict=True)
        if isinstance(part, torch.nn.Linear) and ".layers." in name
    ]
    for bits in (4, 3, 2):
        for variant, search in VARIANTS.items():
            total = Sums()
            for layer, weight in layers:
                layer.weight.data, sums = search(weight, bits)
                total += sums
            found = evaluate_windows(model, windows, options, reference=source)
            assert found.kl is not None
            assert found.kl_se is not None
            assert found.top1 is not None
            yield Row(
                folder.name, bits, variant, total.bits / total.weights, total.error / total.energy,
                found.perplexity, found.kl, found.kl_se, found.top1,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-tokens", type=int, default=6000)
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    models = [(MODEL_DIR, heldout(), 256)]
    for name, context in (("stories260K", 512), ("stories15M", 256)):
        if (SHARED / "models" / name).is_dir():
            text = split_text(read_text(str(SHARED / "text" / "tinystories.txt")), 0.9)[1]
            models.append((SHARED / "models" / name, text, context))
    rows = []
    for folder, text, context in models:
        for row in measure(folder, text, context, asked.max_tokens):
            rows.append(row)
            print(
                f"int{row.bits} {row.variant:24}{row.entropy:9.3f}{row.error:10.5f}"
                f"{row.perplexity:12.2f}{row.kl:10.4f} ± {row.kl_se:.4f}{100 * row.top1:7.1f}",
                flush=True,
            )
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
