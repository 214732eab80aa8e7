"""The windows of tokens that a conversion looks at: of a text, or sampled from the source."""

from __future__ import annotations

import torch

from irq_convert.core.threads import torch_threads
from irq_convert.errors import UsageError
from irq_convert.hf.layered import LayeredModel
from irq_convert.hf.limits import check_vocabulary
from irq_convert.jobs.calibration.options import SELF, CalibrationOptions
from irq_convert.jobs.calibration.sampled import sample_tokens
from irq_convert.jobs.calibration.source import source_tokenizer
from irq_convert.jobs.calibration.text import Windows, choose_windows, tokenize_source
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.plan import QuantizePlan
from irq_convert.progress import Progress


def read_windows(
    plan: QuantizePlan,
    options: QuantizeOptions,
    chosen: CalibrationOptions,
    model: LayeredModel,
    progress: Progress,
    *,
    no_stream: str,
    sample: bool = True,
) -> Windows:
    """The windows that `chosen` asks for, whose tokens `model` knows.

    `no_stream` is the line for a run that would sample while it streams. Without `sample` the
    windows of a text that the source would write are empty. Raises `UsageError` for tokens beyond
    the vocabulary, and as reading the text does.
    """
    progress.stage("reading the text")
    folder = plan.folder
    tokenizer = source_tokenizer(folder.source, folder.made, folder.carried, folder.config)
    if chosen.text == SELF and options.stream:
        raise UsageError(no_stream)
    if chosen.text == SELF and not sample:
        ids, name = torch.zeros(chosen.tokens, dtype=torch.int64), SELF
    elif chosen.text == SELF:
        with torch_threads(options.threads):
            ids, name = sample_tokens(model, tokenizer, chosen, progress), SELF
    else:
        ids, name = tokenize_source(chosen, tokenizer)
    windows = choose_windows(ids, chosen, name)
    check_vocabulary(model.model, windows.ids)
    return windows
