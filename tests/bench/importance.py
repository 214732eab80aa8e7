"""KL divergence by squared error, plain and weighed by importance, for every codebook.

    python tests/bench/importance.py MODEL --text FILE --held-out FILE --max-tokens 6144

measures MODEL on the first text, quantizes it with and without, and prints one table against the
dense model on the second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.spec import QuantSpec
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.report import EvalReport
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.measure.measure import measure
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize

LINE = "| {:6} | {:>15} | {:>15} | {:>11} | {:>11} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--codebooks", default=",".join(CODEBOOKS))
    asked = parser.parse_args()
    logging.disable_progress_bar()
    ids = encode_stream(load_tokenizer(asked.model), read_text(asked.held_out), asked.max_tokens)
    windows, options = cut_windows(ids, asked.context), EvalOptions(context=asked.context)
    reference = load_causal_lm(asked.model)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "importance.safetensors"
        seen = measure(
            asked.model, file, text=asked.text, tokens=asked.tokens, window=asked.context
        )
        print(f"{seen.tokens:,} tokens of {seen.text}; {len(windows)} windows held out")
        print(LINE.format("", "KL plain", "KL weighed", "ppl plain", "ppl weighed"), flush=True)

        def scored(codebook: str, importance: Path | None) -> EvalReport:
            out = Path(scratch) / f"{codebook}-{importance is None}"
            spec = QuantSpec(codebook, 64, "mse")
            quantize(asked.model, out, QuantizeOptions(spec, importance=importance))
            return evaluate_windows(load_causal_lm(out), windows, options, reference=reference)

        for codebook in asked.codebooks.split(","):
            pair = scored(codebook, None), scored(codebook, file)
            kl = (f"{found.kl:.4f} ± {found.kl_se:.4f}" for found in pair)
            perplexity = (f"{found.perplexity:.3f}" for found in pair)
            print(LINE.format(codebook, *kl, *perplexity), flush=True)


if __name__ == "__main__":
    main()
