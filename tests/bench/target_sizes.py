"""The size that was asked for and the size that came, on random models of several architectures.

    python tests/bench/target_sizes.py [--only "Llama 3,Mixtral"]

Every model is as wide as a small real one: what is held back is what the manifest takes at its
longest, less what it takes, some 6 kB and 140 bytes a tensor. Sensitivities are measured once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from irq_convert.errors import UsageError
from irq_convert.jobs.calibration import source as text_source
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.sizing.options import TargetOptions
from tests.architectures.zoo import BY_NAME, VOCABULARY, write_checkpoint
from tests.jobs.calibration.words import word_text, write_word_tokenizer

NAMES = (
    *("Llama 2", "Llama 3", "Mistral", "Qwen 2", "Qwen 3", "Gemma 2", "Phi-3", "GPT-NeoX"),
    *("OLMo 2", "Mixtral"),
)
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
SHARES = (0.085, 0.1, 0.12)
"""Of the source's bytes, which are float32: some 2.5 to 3.6 bits a weight."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(NAMES))
    names = parser.parse_args().only.split(",")
    logging.disable_progress_bar()
    # Some architectures have a tokenizer class of their own, which takes no plain words.
    text_source.load_tokenizer = PreTrainedTokenizerFast.from_pretrained
    print("| architecture | asked, bytes | got | of what was asked |")
    print("|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            rows(name, Path(scratch))


def rows(name: str, scratch: Path) -> None:
    """A line for each size that is asked of the architecture `name`."""
    kind = BY_NAME[name]
    wide = replace(kind, values={**kind.values, **WIDE})
    source = write_checkpoint(wide, scratch / "source")
    write_word_tokenizer(source, VOCABULARY)
    text = scratch / "words.txt"
    text.write_text(word_text(VOCABULARY, 2000))
    whole = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    for number, share in enumerate(SHARES):
        asked, out = int(share * whole), scratch / f"{number}"
        target = TargetOptions(
            size=asked, text=str(text), tokens=512, window=16, file=scratch / "kept.safetensors"
        )
        try:
            quantize(source, out, QuantizeOptions.of(target=target, threads=1))
        except UsageError as error:
            print(f"| {name} | {asked:,} | {error} | |", flush=True)
            continue
        got = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        print(f"| {name} | {asked:,} | {got:,} | {got / asked:.3%} |", flush=True)


if __name__ == "__main__":
    main()
