"""What calibrating with data is worth: KL to the source on held-out text, way by way.

    python tests/bench/calibrated.py MODEL --text C4 --judge OTHER --judge MORE --codebooks int3,nf3
    python tests/bench/calibrated.py MODEL --text C4 --judge OTHER --codebooks int3 --ablation
    python tests/bench/calibrated.py MODEL --text C4 --judge OTHER --tokens 4096,16384

Ways are objectives without data, importance, calibrated, "entropy calibrated" (the paper's ICQ as
its start) and self (the text sampled from MODEL). Every row quantizes MODEL in blocks of 64 and
measures it beside the dense model on the same windows; seconds are of quantizing alone. Folders of
peers.py are judged by --beside. The ablation adds one piece of the loop after the other.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.core.spec import QuantSpec
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.measure.measure import measure
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize

PIECES: dict[str, dict[str, Any]] = {
    "weighed statistics": {"sweep": False, "rounds": 0, "correction": 0.0},
    "+ sweep": {"rounds": 0, "correction": 0.0},
    "+ refit and descent, 1 round": {"rounds": 1, "correction": 0.0},
    "+ 3 rounds": {"correction": 0.0},
    "+ correction, correction 0.5": {},
    "correction 0.75": {"correction": 0.75},
    "correction 1": {"correction": 1.0},
    "no rounds": {"rounds": 0},
    "damping 0.01": {"damping": 0.01},
}


def main() -> None:
    asked = _parse()
    logging.disable_progress_bar()
    tokenizer, reference = load_tokenizer(asked.model), _remembered(load_causal_lm(asked.model))
    judges = {}
    for path in asked.judge:
        ids = encode_stream(tokenizer, read_text(path), asked.windows * asked.context)
        judges[path.name] = cut_windows(ids, asked.context)
    print("| codebook | way | seconds |" + "".join(f" {name} |" for name in judges))
    print("|---|---|---|" + "---|" * len(judges))
    with tempfile.TemporaryDirectory() as scratch:
        for number, (codebook, way, options) in enumerate(_rows(asked, Path(scratch))):
            out = Path(scratch) / str(number)
            begun = time.perf_counter()
            quantize(asked.model, out, options)
            seconds = time.perf_counter() - begun
            cells = [_score(out, windows, reference, asked.context) for windows in judges.values()]
            print(f"| {codebook} | {way} | {seconds:.0f} | {' | '.join(cells)} |", flush=True)
    for name, _, folder in (each.partition("=") for each in asked.beside):
        cells = [_score(folder, windows, reference, asked.context) for windows in judges.values()]
        print(f"| {name} | | | {' | '.join(cells)} |", flush=True)


def _remembered(model: Any) -> Any:
    """`model`, which keeps what it once said: every row is judged on the same windows."""
    forward, said = model.forward, dict[bytes, Any]()

    def remember(input_ids: Tensor, **given: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in said:
            said[key] = forward(input_ids=input_ids, **given)
        return said[key]

    model.forward = remember
    return model


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to calibrate with")
    parser.add_argument("--judge", type=Path, action="append", required=True)
    parser.add_argument("--codebooks", default="int3,nf3")
    parser.add_argument("--tokens", default="16384")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="to judge by")
    parser.add_argument("--beside", action="append", default=[], help="NAME=FOLDER of peers.py")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--ways", default="mse,entropy,importance,calibrated,entropy calibrated")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def _rows(asked: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, str, QuantizeOptions]]:
    sizes = [int(each) for each in asked.tokens.split(",")]
    for codebook in filter(None, asked.codebooks.split(",")):
        if asked.ablation:
            for way, changes in PIECES.items():
                yield codebook, way, _calibrated(asked, codebook, "mse", sizes[0], **changes)
        elif len(sizes) > 1:
            for size in sizes:
                yield codebook, f"{size:,} tokens", _calibrated(asked, codebook, "mse", size)
        else:
            yield from _ways(asked, codebook, sizes[0], scratch)


def _ways(
    asked: argparse.Namespace, codebook: str, tokens: int, scratch: Path
) -> Iterator[tuple[str, str, QuantizeOptions]]:
    for way in asked.ways.split(","):
        spec = QuantSpec(codebook, 64, "entropy" if "entropy" in way else "mse")
        if "calibrated" in way:
            yield codebook, way, _calibrated(asked, codebook, spec.objective, tokens)
        elif way == "self":
            yield codebook, way, _calibrated(asked, codebook, "mse", tokens, text="self")
        elif way == "importance":
            file = scratch / "importance.safetensors"
            if not file.exists():
                measure(
                    asked.model, file, text=asked.text, tokens=tokens, window=asked.context,
                    threads=asked.threads,
                )  # fmt: skip
            yield codebook, way, QuantizeOptions(spec, importance=file, threads=asked.threads)
        else:
            yield codebook, way, QuantizeOptions(spec, threads=asked.threads)


def _calibrated(
    asked: argparse.Namespace, codebook: str, objective: str, tokens: int, **changes: Any
) -> QuantizeOptions:
    given = {"text": asked.text, "tokens": tokens, "window": asked.context, **changes}
    chosen = CalibrationOptions(**given)
    spec = QuantSpec(codebook, 64, objective)
    return QuantizeOptions(spec, calibrate=chosen, threads=asked.threads)


def _score(out: Path | str, windows: Sequence[Tensor], reference: Any, context: int) -> str:
    options = EvalOptions(context=context)
    found = evaluate_windows(load_causal_lm(out), windows, options, reference=reference)
    return f"{found.kl:.4f} ± {found.kl_se:.4f}"


if __name__ == "__main__":
    main()
