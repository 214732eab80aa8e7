"""What training wins back of what quantizing lost, kind by kind: KL to the source, held-out text.

    python tests/bench/adapter_kinds.py MODEL --text FIRST --judge LAST --bases nf2:calibrated
    python tests/bench/adapter_kinds.py MODEL --text FIRST --judge LAST --bases int3:mse \\
        --kinds plain,iec,iec:input,block,statistics,plain+statistics,plain+error --steps 50
    python tests/bench/adapter_kinds.py MODEL --text FIRST --judge LAST --bases nf3:entropy --labels

A base is a codebook and how it was chosen: none, entropy, mse or calibrated, in blocks of 64. A
kind is one of `finetune --lora`, with a connection, or one of the statistics, after a colon;
"+statistics" trains these besides, "+error" starts at the error. Batches are of 4 sequences; with
--labels the loss is that of the text, else KL to the source. Statistics are judged merged, in 8
bits; all others as they are. Beside KL stands the loss on the held-out text, less that of the
source.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.core.spec import QuantSpec
from irq_convert.core.threads import torch_threads
from irq_convert.errors import IrqError
from irq_convert.hf.causal_lm import load_causal_lm, load_tokenizer
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.jobs.finetune.finetune import finetune
from irq_convert.jobs.finetune.options import FinetuneOptions
from irq_convert.jobs.merge.merge import merge
from irq_convert.jobs.merge.options import Check, MergeOptions, MergeTo
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize

KINDS = "plain,iec,iec:input,iec:output,block,statistics,plain+statistics,plain+error"


def main() -> None:
    asked = _parse()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, torch_threads(asked.threads):
        bench = Bench(asked, Path(scratch))
        print(f"{asked.steps} steps of {4 * asked.context:,} tokens, ", end="")
        print("labels" if asked.labels else "KL to the source")
        print("| base | kind | seed | seconds | KL | of the base's | loss, over the source's |")
        print("|---|---|---|---|---|---|---|")
        for base in asked.bases.split(","):
            bench.base(base)


class Bench:
    """The source, the windows to judge by, and a folder for what is made."""

    def __init__(self, asked: argparse.Namespace, scratch: Path) -> None:
        self.asked, self.scratch = asked, scratch
        ids = encode_stream(
            load_tokenizer(asked.model), read_text(asked.judge), asked.windows * asked.context
        )
        self.windows = cut_windows(ids, asked.context)
        self.reference = load_causal_lm(asked.model)
        self.logits = scratch / "teacher.safetensors"

    def base(self, name: str) -> None:
        """One base, and every kind trained on it."""
        asked = self.asked
        codebook, _, how = name.partition(":")
        chosen = None
        if how == "calibrated":
            chosen = CalibrationOptions(
                asked.text, tokens=asked.calibration_tokens, window=asked.context
            )
        spec = QuantSpec(codebook, 64, "mse" if chosen else how)
        folder = self.scratch / codebook / how
        quantize(asked.model, folder, QuantizeOptions(spec, calibrate=chosen))
        before = self.judge(folder)
        print(f"| {name} | | | | {_figures(before, before)} |", flush=True)
        for kind in asked.kinds.split(","):
            for seed in range(asked.seeds):
                begun = time.perf_counter()
                try:
                    found = self.trained(folder, kind, seed)
                except IrqError as error:  # towards a teacher and no nearer to it
                    print(f"| {name} | {kind} | {seed} | | {error} | | |", flush=True)
                    continue
                seconds = time.perf_counter() - begun
                cells = f"{kind} | {seed} | {seconds:.0f} | {_figures(found, before)}"
                print(f"| {name} | {cells} |", flush=True)

    def trained(self, folder: Path, kind: str, seed: int) -> Any:
        """What an adapter of `kind` makes of the artifact in `folder`."""
        out = self.scratch / f"{folder.parent.name}-{folder.name}-{kind}-{seed}"
        options = self.options(kind, seed)
        finetune(folder, self.asked.text, out, options)
        if not kind.startswith("statistics"):
            return self.judge(folder, out)
        merged = out.with_name(out.name + "-merged")
        merge(folder, out, merged, MergeOptions(to=MergeTo.IRQ, check=Check.NONE))
        return self.judge(merged)

    def options(self, kind: str, seed: int) -> FinetuneOptions:
        """The run of `kind`."""
        asked = self.asked
        first, *more = kind.split("+")
        lora, _, connection = first.partition(":")
        which = "both" if "statistics" in more else None
        if lora == "statistics" and connection:
            which, connection = connection, ""
        given: dict[str, Any] = {"learning_rate": asked.rate}
        if lora != "statistics":
            given |= {"dropout": asked.dropout, "rank": asked.rank}
        if not asked.labels:
            given |= {"teacher": asked.model, "teacher_logits": self.logits}
        given["init"] = "error" if "error" in more else "default"
        if "error" in more:
            given["source"] = asked.model
        if lora in ("iec", "block") and connection != "none":
            given["beta_rate"] = asked.beta_rate
        return FinetuneOptions(
            lora=lora, connection=connection or None, seed=seed, steps=asked.steps,
            statistics=which, batch_size=4, sequence_length=asked.context,
            eval_every=asked.steps, **given,
        )  # fmt: skip

    def judge(self, folder: Path, adapter: Path | None = None) -> Any:
        """KL to the source of an artifact, with an adapter on it."""
        model: Any = load_causal_lm(folder)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
        options = EvalOptions(context=self.asked.context)
        return evaluate_windows(model, self.windows, options, reference=self.reference)


def _figures(found: Any, before: Any) -> str:
    kl = f"{found.kl:.4f} ± {found.kl_se:.4f} | {found.kl / before.kl:.3f}"
    return f"{kl} | {found.nll_difference:+.4f} ± {found.nll_difference_se:.4f}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to calibrate with and to train on")
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--bases", default="int3:mse,int3:calibrated")
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rate", type=float, help="instead of the default of each kind")
    parser.add_argument("--beta-rate", type=float, help="of IEC's betas")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--labels", action="store_true", help="train on the text, not the source")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="to judge by")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
