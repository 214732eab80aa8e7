"""Models of every architecture with a tokenizer of plain words, and a text for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from irq_convert.jobs.calibration import source as text_source
from tests.architectures.zoo import BY_NAME, write_checkpoint
from tests.jobs.calibration.words import word_text, write_word_tokenizer

VOCABULARY, WINDOW, TOKENS = 96, 16, 512


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes the model of a kind of the zoo."""
    # Some architectures have a tokenizer class of their own, which takes no plain words.
    monkeypatch.setattr(text_source, "load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    warnings.simplefilter("ignore")

    def write(name: str) -> Path:
        folder = write_checkpoint(BY_NAME[name], tmp_path / "source")
        write_word_tokenizer(folder, VOCABULARY)
        return folder

    return write


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """More words than are asked for."""
    path = tmp_path / "words.txt"
    path.write_text(word_text(VOCABULARY, 3 * TOKENS))
    return path
