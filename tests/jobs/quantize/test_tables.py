"""Embeddings and heads beside a size that is asked for: around the mix, in a width of their own."""

from __future__ import annotations

from pathlib import Path

import irq_convert
from irq_convert.artifact.contents import open_artifact
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.sizing.options import TargetOptions
from irq_convert.progress import Progress
from tests.architectures.zoo import BY_NAME, write_checkpoint
from tests.jobs.calibration.words import word_text, write_word_tokenizer


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_target_is_for_the_layers(tmp_path: Path) -> None:
    source = write_checkpoint(BY_NAME["Llama 2"], tmp_path / "source")
    write_word_tokenizer(source, 96)
    (tmp_path / "text.txt").write_text(word_text(96, 1024))
    target = TargetOptions(bits=3.5, text=str(tmp_path / "text.txt"), tokens=256, window=16)
    notes = Notes()
    options = {"include_embeddings": True, "bits_for": (("embed", 3),), "threads": 1}
    quantize(source, tmp_path / "a", target=target, progress=notes, **options)
    assert any("embeddings and heads are nf4" in line for line in notes.lines)
    found = {t.name: t.format.codebook for t in open_artifact(tmp_path / "a").quantized}
    assert found["model.embed_tokens.weight"] == "nf3"
    assert found["lm_head.weight"] == "nf4"
    assert irq_convert.verify(tmp_path / "a", against=source).ok
