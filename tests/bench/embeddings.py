"""What quantizing embeddings and head saves, and what it costs: bytes, memory and KL divergence.

    python tests/bench/embeddings.py MODEL --text FILE --max-tokens 8192

quantizes MODEL with and without `--include-embeddings` and prints one table: bytes of the weights'
files, bytes of the loaded model's tensors in the dtype of the source, perplexity, KL divergence
from the dense model, and whether logits in float32 are those of the dense export to the bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.hf.loading import load
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.export.export import export
from irq_convert.jobs.quantize.quantize import quantize

LINE = "| {:12} | {:>11} | {:>11} | {:>10} | {:>15} | {:>6} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--codebooks", default="nf4,nf3")
    asked = parser.parse_args()
    logging.disable_progress_bar()
    ids = encode_stream(load_tokenizer(asked.model), read_text(asked.text), asked.max_tokens)
    windows, options = cut_windows(ids, asked.context), EvalOptions(context=asked.context)
    reference = load_causal_lm(asked.model)
    plain = evaluate_windows(reference, windows, options)
    print(f"{ids.numel():,} tokens; source: {_weights(Path(asked.model)):,} bytes", end="")
    print(f", perplexity {plain.perplexity:.3f}")
    print(LINE.format("", "files", "memory", "perplexity", "KL", "twin"), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for codebook in asked.codebooks.split(","):
            for tables in (False, True):
                out = Path(scratch) / f"{codebook}{' + tables' * tables}"
                quantize(asked.model, out, codebook=codebook, include_embeddings=tables)
                memory = load(out).get_memory_footprint()
                model = load_causal_lm(out)
                found = evaluate_windows(model, windows, options, reference=reference)
                same = _is_twin(model, out, windows[0][None])
                print(
                    LINE.format(
                        out.name,
                        f"{_weights(out):,}",
                        f"{memory:,}",
                        f"{found.perplexity:.3f}",
                        f"{found.kl:.4f} ± {found.kl_se:.4f}",
                        "equal" if same else "differs",
                    ),
                    flush=True,
                )


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _is_twin(model: torch.nn.Module, artifact: Path, ids: torch.Tensor) -> bool:
    """Whether the logits are those of the dense export, in float32 to the bit."""
    out = artifact.with_name("dense")
    export(artifact, out, to="dense", dtype="float32", overwrite=True)
    twin = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        return torch.equal(model(ids).logits, twin(ids).logits)


if __name__ == "__main__":
    main()
