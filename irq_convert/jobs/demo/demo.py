"""The demo: quantize the shipped model at 4, 3 and 2 bits, measure, finetune, merge, measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from irq_convert.artifact.verify import verify_artifact
from irq_convert.core.spec import QuantSpec
from irq_convert.errors import IrqError
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.common.text import cut_windows, encode_stream
from irq_convert.jobs.demo import MODEL_DIR
from irq_convert.jobs.demo.corpus import heldout
from irq_convert.jobs.demo.journey import DemoStep, run_journey
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import open_source, quantize

CONTEXT = 256
WINDOWS = 48
BITS = (4, 3, 2)
VARIANTS = (("plain", "none", 0), ("ICQ", "entropy", 0), ("ICQ, refined", "entropy", 10))


@dataclass(frozen=True)
class DemoRow:
    """One line of the table: `entropy` in bits a code, `kl` in nats a token, None at the source."""

    name: str
    megabytes: float
    bits_per_weight: float
    entropy: float | None
    perplexity: float
    perplexity_se: float | None
    kl: float | None
    kl_se: float | None

    def to_dict(self) -> dict[str, object]:
        """All fields, for JSON."""
        return asdict(self)


def run_demo(
    folder: Path, note: Callable[[str], None] = lambda text: None
) -> Iterator[DemoRow | DemoStep]:
    """Yield a row for the source and for each width and variant, then one for each later step.

    All folders are written below `folder`. Perplexity is that of held-out text from the same
    generator, in windows of 256 tokens. Every artifact is verified against the source before it is
    loaded; adapters are trained on the one with the fewest bits.
    """
    torch.set_num_threads(1)  # a model this small only waits for its threads
    windows = cut_windows(encode_stream(load_tokenizer(str(MODEL_DIR)), heldout()), CONTEXT)[
        :WINDOWS
    ]
    options = EvalOptions(context=CONTEXT)
    yield from _quantize(folder, windows, options, note)
    base = folder / f"{min(BITS)}bit-entropy-0"
    yield from run_journey(folder, base, windows, options, note)


def _quantize(
    folder: Path,
    windows: Sequence[torch.Tensor],
    options: EvalOptions,
    note: Callable[[str], None],
) -> Iterator[DemoRow]:
    reference = load_causal_lm(str(MODEL_DIR))
    base = evaluate_windows(reference, windows, options)
    size = sum(path.stat().st_size for path in MODEL_DIR.iterdir()) / 1e6
    yield DemoRow("source", size, 16.0, None, base.perplexity, base.perplexity_se, None, None)
    for bits in BITS:
        for label, objective, refine in VARIANTS:
            name = f"{bits} bit, {label}"
            note(name)
            out = folder / f"{bits}bit-{objective}-{refine}"
            spec = QuantSpec(f"nf{bits}", 64, objective, refine)
            report = quantize(str(MODEL_DIR), out, QuantizeOptions(spec))
            failures = verify_artifact(out, against=open_source(str(MODEL_DIR))).failures
            if failures:
                raise IrqError(f"{out}: {failures[0]}")
            found = evaluate_windows(
                load_causal_lm(str(out)), windows, options, reference=reference
            )
            yield DemoRow(
                name,
                report.bytes_out / 1e6,
                report.bits_per_weight,
                report.entropy,
                found.perplexity,
                found.perplexity_se,
                found.kl,
                found.kl_se,
            )
