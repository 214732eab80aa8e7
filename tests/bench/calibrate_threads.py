"""Whether calibrating gives the same bytes: twice over, and with one thread and with more.

    python tests/bench/calibrate_threads.py MODEL --text C4 --judge OTHER

Products of float32 matrices are added up in another order by another number of threads, so codes
whose choice was a tie but for rounding may come out otherwise, and what follows them with them.
Prints how many codes and pairs (tau, scale) differ, and the KL divergence of each artifact to the
source on held-out windows.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.artifact.contents import open_artifact, read_quantized
from irq_convert.checkpoint.reader import TileReader
from irq_convert.core.packing import unpack_codes
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.quantize.quantize import quantize
from tests.folders import listing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    choice = CalibrationOptions(asked.text, tokens=asked.tokens, window=asked.context)
    with tempfile.TemporaryDirectory() as name:
        folders = {
            "one thread": (Path(name, "one"), 1),
            "one thread again": (Path(name, "again"), 1),
            f"{asked.threads} threads": (Path(name, "more"), asked.threads),
        }
        for out, threads in folders.values():
            quantize(asked.model, out, bits=asked.bits, calibrate=choice, threads=threads)
        first = folders["one thread"][0]
        source, windows = load_causal_lm(asked.model), _windows(asked)
        options = EvalOptions(context=asked.context)
        for title, (out, _) in folders.items():
            found = evaluate_windows(load_causal_lm(out), windows, options, reference=source)
            same = listing(out) == listing(first)
            what = "the bytes of the first" if same else _differences(first, out)
            print(f"{title}: KL {found.kl:.4f} ± {found.kl_se:.4f}, {what}", flush=True)


def _windows(asked: argparse.Namespace) -> torch.Tensor:
    text, tokens = read_text(asked.judge), asked.windows * asked.context
    return cut_windows(encode_stream(load_tokenizer(asked.model), text, tokens), asked.context)


def _differences(one: Path, other: Path) -> str:
    codes, pairs, every = 0, 0, [0, 0]
    with TileReader() as reader:
        for a, b in zip(open_artifact(one).quantized, open_artifact(other).quantized, strict=True):
            p, q = (read_quantized(reader, each, 0, each.shape.rows) for each in (a, b))
            bits = a.format.bits
            left, right = (unpack_codes(each.codes, bits, each.cols) for each in (p, q))
            codes += int((left != right).sum())
            pairs += int(((p.scale != q.scale) | (p.tau != q.tau)).sum())
            every = [every[0] + left.numel(), every[1] + p.scale.numel()]
    return f"{codes / every[0]:.2%} of the codes and {pairs / every[1]:.2%} of the pairs differ"


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
