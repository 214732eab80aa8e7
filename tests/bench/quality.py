"""Perplexity and KL divergence of every codebook and objective, on held-out text.

    python tests/bench/quality.py MODEL --text FILE --from-fraction 0.9 --max-tokens 12800

quantizes MODEL with each codebook, objective and refinement, verifies and loads the artifact,
checks that its dense weights equal those of the independent numpy reader bit for bit, generates
a few tokens, and prints one table against the dense model.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from irq_convert.artifact.verify import verify_artifact
from irq_convert.core.codebook import CODEBOOKS
from irq_convert.core.spec import QuantSpec
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text, split_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import open_source, quantize
from irq_convert.nn.linear import IrqLinear

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.formats import numpy_reader

VARIANTS = [(objective, refine) for objective in ("none", "entropy", "mse") for refine in (0, 10)]
LINE = "{:6} {:8} {:>6} {:>7} {:>8} {:>16} {:>17} {:>6}"


def check_dense(model: torch.nn.Module, folder: Path) -> None:
    """The loaded weights are those of the reader that knows only the specification."""
    expected = numpy_reader.read_artifact(folder)
    for name, module in model.named_modules():
        if isinstance(module, IrqLinear):
            dense = module.dequantize(torch.float32).numpy()
            wanted = np.ascontiguousarray(expected[f"{name}.weight"])
            assert np.array_equal(dense.view(np.uint32), wanted.view(np.uint32)), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--from-fraction", type=float, default=0.9)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--codebooks", default=",".join(CODEBOOKS))
    parser.add_argument("--json", help="also write the rows to this file")
    asked = parser.parse_args()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(asked.model)
    text = split_text(read_text(asked.text), asked.from_fraction)[1]
    windows = cut_windows(encode_stream(tokenizer, text, asked.max_tokens), asked.context)
    options = EvalOptions(context=asked.context)
    reference = load_causal_lm(asked.model)
    base = evaluate_windows(reference, windows, options)
    print(f"{asked.model}: {base.tokens} tokens in {base.windows} windows of {asked.context}")
    print(f"dense: perplexity {base.perplexity:.3f} ± {base.perplexity_se:.3f}")
    titles = ("", "objective", "refine", "entropy", "error", "perplexity", "KL, nats", "top-1")
    print(LINE.format(*titles), flush=True)
    rows = [{"codebook": "dense", **base.to_dict()}]
    for codebook in asked.codebooks.split(","):
        for objective, refine in VARIANTS:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                spec = QuantSpec(codebook, 64, objective, refine)
                report = quantize(asked.model, out, QuantizeOptions(spec))
                assert not verify_artifact(out, against=open_source(asked.model)).failures
                model = load_causal_lm(str(out))
                check_dense(model, out)
                ids = torch.tensor([windows[0][:8].tolist()])
                assert model.generate(ids, max_new_tokens=8, do_sample=False).shape[1] > 8
                found = evaluate_windows(model, windows, options, reference=reference)
            rows.append({**found.to_dict(), "codebook": codebook, "objective": objective,
                         "refine": refine, "entropy": report.entropy,
                         "relative_error": report.relative_error})  # fmt: skip
            print(
                LINE.format(
                    codebook, objective, refine, f"{report.entropy:.3f}",
                    f"{report.relative_error:.5f}",
                    f"{found.perplexity:.2f} ± {found.perplexity_se:.2f}",
                    f"{found.kl:.4f} ± {found.kl_se:.4f}", f"{100 * found.top1:.1f}",
                ),
                flush=True,
            )  # fmt: skip
    if asked.json:
        Path(asked.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
