"""A tiny LLaMA with a tokenizer of plain words, a text for it, and what a run makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.quantize.options import QuantizeOptions
from tests.jobs.calibration.words import word_text, write_word_tokenizer
from tests.tiny import LLAMA, VOCABULARY, llama_tensors, write_source

WINDOW, TOKENS = 32, 512


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_source(tmp_path / "source", llama_tensors(), LLAMA)
    write_word_tokenizer(folder, VOCABULARY)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(word_text(VOCABULARY, 4 * TOKENS))
    return path


def calibrating(text: Path | str, **others: Any) -> QuantizeOptions:
    """Options of a small calibrated run; `others` are those of both kinds."""
    own = {
        name: others.pop(name)
        for name in ("correction", "rounds", "tokens", "window", "seed")
        if name in others
    }
    chosen = CalibrationOptions(str(text), **({"tokens": TOKENS, "window": WINDOW} | own))
    given: dict[str, Any] = {"bits": 2, "block_size": 16, "threads": 1} | others
    return QuantizeOptions.of(calibrate=chosen, **given)
