"""Windows of a text, as the jobs that run a model over one cut them."""

from __future__ import annotations

from pathlib import Path

from irq_convert.checkpoint.source import Checkpoint
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.calibration.source import checkpoint_tokenizer
from irq_convert.jobs.calibration.text import Windows, take_windows, tokenize_source


def text_windows(source: Checkpoint, text: Path | str, tokens: int, window: int) -> Windows:
    """At most `tokens` of the file `text`, in tokens of the source."""
    choice = CalibrationOptions(str(text), tokens=tokens, window=window)
    ids, name = tokenize_source(choice, checkpoint_tokenizer(source))
    return take_windows(ids, choice, name)
