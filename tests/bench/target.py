"""What a mix is worth: KL to the source beside one choice for all and two naive mixes, by size.

    python tests/bench/target.py MODEL --text FIRST --judge LAST --bits 2.28,2.52,3.28,3.52
    python tests/bench/target.py MODEL --text FIRST --judge LAST --ways plain,importance,calibrated

Every size is in bits of a quantized weight. The uniform choice is the best of all codebooks and
block sizes that is no larger, by what it really does on the judging text. The naive mixes give a
width more, in blocks of 64, to the attention first, or to the outer layers first, as far as the
size allows. Seconds are of the whole run, with what it measures; sensitivities are measured once.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.artifact.contents import open_artifact
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.measure.measure import measure
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.sizing.choices import Choice, quantized_choices
from irq_convert.jobs.sizing.options import TargetOptions


def main() -> None:
    asked = _parse()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(asked, Path(scratch))
        print("| way | bits asked | kind | bits | seconds | KL |")
        print("|---|---|---|---|---|---|")
        for way in asked.ways.split(","):
            for bits in map(float, asked.bits.split(",")):
                bench.size(way, bits)


class Bench:
    """The source, the windows to judge by, and what has been measured."""

    def __init__(self, asked: argparse.Namespace, scratch: Path) -> None:
        self.asked, self.scratch, self.number = asked, scratch, 0
        ids = encode_stream(
            load_tokenizer(asked.model), read_text(asked.judge), asked.windows * asked.context
        )
        self.windows = cut_windows(ids, asked.context)
        self.reference = load_causal_lm(asked.model)
        self.uniform: dict[tuple[str, str, int], tuple[float, Any]] = {}

    def size(self, way: str, bits: float) -> None:
        """A mix of so many bits, and what else there is of its size."""
        target = TargetOptions(
            bits=bits, text=None if way == "plain" else self.asked.text,
            tokens=self.asked.tokens, window=self.asked.context,
            file=self.scratch / f"sensitivity-{way}.safetensors",
        )  # fmt: skip
        self.row(way, bits, "mix", target=target)
        for kind, order in (("attention", _attention_first), ("outer layers", _outer_first)):
            chosen = self.naive(bits, order)
            if chosen is not None:
                base, names = chosen
                up = tuple((f"^{re.escape(name)}$", base + 1) for name in names)
                self.row(way, bits, f"{kind} first", bits=base, bits_for=up)
        best = None
        for choice in self.asked.uniform:
            own, found = self.judged_uniform(way, str(choice.codebook), choice.block_size or 0)
            if own <= bits and (best is None or found.kl < best[2].kl):
                best = str(choice), own, found
        if best is not None:
            kl = f"{best[2].kl:.4f} ± {best[2].kl_se:.4f}"
            print(f"| {way} | {bits:g} | uniform {best[0]} | {best[1]:.3f} | | {kl} |", flush=True)

    def judged_uniform(self, way: str, codebook: str, block: int) -> tuple[float, Any]:
        """Bits and KL of one choice for all."""
        key = way, codebook, block
        if key not in self.uniform:
            out = self.quantized(way, codebook=codebook, block_size=block, bits=int(codebook[-1]))
            self.uniform[key] = open_artifact(out).bits_per_weight, self.judge(out)
        return self.uniform[key]

    def naive(self, bits: float, order: Any) -> tuple[int, list[str]] | None:
        """The width of most, and which weights get one more."""
        base = int(bits - 0.2815625)
        if base not in (2, 3):
            return None
        out = self.quantized("plain", codebook="int", bits=base)
        artifact = open_artifact(out)
        room = (bits - artifact.bits_per_weight) * artifact.quantized_weights
        names = []
        for tensor in order(list(artifact.quantized)):
            if tensor.weights <= room:
                room -= tensor.weights
                names.append(tensor.name)
        return base, names

    def row(self, way: str, asked: float, kind: str, **settings: Any) -> None:
        """Quantize, judge and print."""
        begun = time.perf_counter()
        out = self.quantized(way, **settings)
        seconds = time.perf_counter() - begun
        found, own = self.judge(out), open_artifact(out).bits_per_weight
        kl = f"{found.kl:.4f} ± {found.kl_se:.4f}"
        print(f"| {way} | {asked:g} | {kind} | {own:.3f} | {seconds:.0f} | {kl} |", flush=True)

    def quantized(self, way: str, **settings: Any) -> Path:
        """A folder with the model quantized."""
        self.number += 1
        out = self.scratch / f"{self.number}"
        if "target" not in settings:
            settings = {"codebook": "int", "objective": "mse", **settings}
        if way == "importance":
            settings["importance"] = self.importance()
        elif way == "calibrated":
            settings["calibrate"] = CalibrationOptions(
                self.asked.text, tokens=self.asked.tokens, window=self.asked.context
            )
        settings |= {"threads": self.asked.threads, "include_embeddings": self.asked.embeddings}
        quantize(self.asked.model, out, QuantizeOptions.of(**settings))
        return out

    def importance(self) -> Path:
        """The file of importance, made once."""
        asked, file = self.asked, self.scratch / "importance.safetensors"
        if not file.exists():
            measure(
                asked.model, file, text=asked.text, tokens=asked.tokens, window=asked.context,
                threads=asked.threads,
            )  # fmt: skip
        return file

    def judge(self, folder: Path) -> Any:
        """KL to the source."""
        options = EvalOptions(context=self.asked.context)
        model = load_causal_lm(folder)
        return evaluate_windows(model, self.windows, options, reference=self.reference)


def _attention_first(tensors: list[Any]) -> list[Any]:
    return sorted(tensors, key=lambda t: "attn" not in t.name and "attention" not in t.name)


def _outer_first(tensors: list[Any]) -> list[Any]:
    layers = [int(found[1]) if (found := re.search(r"\.(\d+)\.", t.name)) else 0 for t in tensors]
    middle = max(layers) / 2
    order = sorted(range(len(tensors)), key=lambda i: (-abs(layers[i] - middle), layers[i], i))
    return [tensors[i] for i in order]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to measure and to calibrate with")
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--bits", default="2.285,2.52,3.285,3.52")
    parser.add_argument(
        "--uniform",
        type=lambda text: [Choice.parse(each) for each in text.split(",")],
        default=quantized_choices(),
        help="what one choice for all may be, as nf3/64,int3/64; by default anything",
    )
    parser.add_argument("--ways", default="plain,importance,calibrated")
    parser.add_argument(
        "--embeddings", action="store_true", help="quantize them, too, and the head"
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="to judge by")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
