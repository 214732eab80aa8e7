"""What adapters that start from the error take away before any training: KL to the source.

    python tests/bench/error_start.py MODEL --text FIRST --judge LAST --codebooks int3,nf3 --rank 64
    python tests/bench/error_start.py MODEL --text FIRST --judge LAST --ways text --ranks 8,16,32,64
    python tests/bench/error_start.py MODEL --text FIRST --judge LAST --calibrate

MODEL is quantized in blocks of 64 by squared error, or with --calibrate on the same text, and is
judged beside the dense model on the same windows: as it is, and with adapters of each kind, rank
and way to start, which nothing has trained.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.adapters.attach import attach
from irq_convert.adapters.kinds import adapter_config
from irq_convert.artifact.adapter_kinds import AdapterKind
from irq_convert.artifact.contents import open_artifact
from irq_convert.checkpoint.locate import open_source
from irq_convert.core.spec import QuantSpec
from irq_convert.core.threads import torch_threads
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.calibration.importance_file import read_importance_file
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.finetune.start_error import start_from_error
from irq_convert.jobs.measure.measure import measure
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.jobs.calibration.windows import text_windows


def main() -> None:
    asked = _parse()
    logging.disable_progress_bar()
    bench = Bench(asked)
    print("| codebook | adapter | rank | start | seconds | error left | KL |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch, torch_threads(asked.threads):
        for codebook in asked.codebooks.split(","):
            folder = Path(scratch) / codebook
            quantize(asked.model, folder, bench.options(codebook))
            print(f"| {codebook} | | | none | | | {bench.score(load_causal_lm(folder))} |")
            for kind, rank, way in bench.rows():
                cells = bench.started(folder, kind, rank, way, Path(scratch))
                print(f"| {codebook} | {kind} | {rank} | {way} | {cells} |", flush=True)


class Bench:
    """The source, its windows, and what is tried."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.source = asked, open_source(asked.model)
        ids = encode_stream(
            load_tokenizer(asked.model), read_text(asked.judge), asked.windows * asked.context
        )
        self.windows = cut_windows(ids, asked.context)
        self.reference = load_causal_lm(asked.model)

    def options(self, codebook: str) -> QuantizeOptions:
        """How the base is quantized."""
        asked, chosen = self.asked, None
        if asked.calibrate:
            chosen = CalibrationOptions(asked.text, tokens=asked.tokens, window=asked.context)
        spec = QuantSpec(codebook, 64, "mse")
        return QuantizeOptions(spec, calibrate=chosen, threads=asked.threads)

    def rows(self) -> Iterator[tuple[str, int, str]]:
        """Kinds, ranks and ways."""
        for kind in self.asked.kinds.split(","):
            for rank in map(int, self.asked.ranks.split(",")):
                for way in self.asked.ways.split(","):
                    yield kind, rank, way

    def started(self, folder: Path, kind: str, rank: int, way: str, scratch: Path) -> str:
        """Seconds, the error left and the KL of an artifact with adapters of this start."""
        model = load_causal_lm(folder)
        config = adapter_config(AdapterKind(kind), r=rank, lora_alpha=16, task_type="CAUSAL_LM")
        adapted: Any = attach(model, config)
        inputs = self.inputs(way, scratch)
        begun = time.perf_counter()
        report = start_from_error(adapted, open_artifact(folder), self.source, inputs=inputs)
        seconds = time.perf_counter() - begun
        return f"{seconds:.0f} | {report.left:.3f} | {self.score(adapted)}"

    def inputs(self, way: str, scratch: Path) -> Any:
        """What `start_from_error` takes for a way of this name."""
        asked = self.asked
        if way == "identity":
            return None
        if way == "importance":
            file = scratch / "importance.safetensors"
            if not file.exists():
                measure(
                    asked.model, file, text=asked.text, tokens=asked.tokens, window=asked.context
                )
            return read_importance_file(file)
        return text_windows(self.source, asked.text, asked.tokens, asked.context)

    def score(self, model: Any) -> str:
        """KL to the source with its standard error."""
        options = EvalOptions(context=self.asked.context)
        found = evaluate_windows(model, self.windows, options, reference=self.reference)
        return f"{found.kl:.4f} ± {found.kl_se:.4f}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to start by")
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--codebooks", default="int3,nf3")
    parser.add_argument("--kinds", default="plain")
    parser.add_argument("--ranks", "--rank", default="64")
    parser.add_argument("--ways", default="identity,importance,text")
    parser.add_argument("--calibrate", action="store_true", help="the base, on the same text")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="to judge by")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
