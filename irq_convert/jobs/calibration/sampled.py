"""A text that the source writes itself: windows of tokens sampled from it.

For models whose training text nobody has. Sampling needs the whole model in memory; one that does
not fit is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from irq_convert.checkpoint.system import short_bytes
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.layered import LayeredModel
from irq_convert.jobs.calibration.options import CalibrationOptions
from irq_convert.jobs.common.memory import available_memory
from irq_convert.progress import Progress

BATCH = 32
_SPARE = 1.3


def sample_tokens(
    model: LayeredModel, tokenizer: Any, options: CalibrationOptions, progress: Progress
) -> torch.Tensor:
    """Tokens that `model` samples, int64 `[tokens]`, window after window.

    Every window begins with the tokenizer's BOS, or with a token drawn evenly where it has none,
    and goes on at temperature 1. Raises `UsageError` for a model that memory does not hold.
    """
    infos = model.source.checkpoint.tensors.values()
    needed = int(_SPARE * 4 * sum(info.numel for info in infos))
    free = available_memory()
    if model.device == "cpu" and free is not None and needed > free:
        raise UsageError(
            f"a text that the model writes itself takes the whole model in memory, "
            f"{short_bytes(needed)} ({short_bytes(free)} free): give one, with --calibrate or "
            "--target-text"
        )
    count = options.tokens // options.width
    generator = torch.Generator().manual_seed(options.seed)
    progress.stage("reading the whole model")
    with torch.no_grad(), model.whole():
        progress.phase("sampling", count, count * options.width)
        parts = []
        for at in range(0, count, BATCH):
            size = min(BATCH, count - at)
            parts.append(_sample(model.model, tokenizer, size, options.width, generator, progress))
            progress.advance(0, finished=size)
    return torch.cat(parts).reshape(-1)


def _sample(
    model: Any,
    tokenizer: Any,
    size: int,
    window: int,
    generator: torch.Generator,
    progress: Progress,
) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    start = tokenizer.bos_token_id
    if start is None:
        ids = torch.randint(0, min(vocabulary, len(tokenizer)), (size, 1), generator=generator)
    else:
        ids = torch.full((size, 1), start)
    found, cache = [ids], None
    for step in range(window - 1):
        given = found[-1].to(next(model.parameters()).device)
        out = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        odds = out.logits[:, -1].float().cpu().softmax(-1)
        if not odds.isfinite().all():
            raise IrqError(
                "the source model gives NaN or infinite logits, so it cannot write a text: give "
                "--calibrate a text of your own"
            )
        found.append(torch.multinomial(odds, 1, generator=generator))
        if step % 16 == 15:
            progress.advance(16 * size, finished=0)
    return torch.cat(found, 1)
