"""The whole job: from the names of models and a text file to an `EvalReport`."""

from pathlib import Path
from typing import Any

import torch

from irq_convert.adapters.put_on import CheckedAdapter, check_adapter, put_on
from irq_convert.errors import UsageError
from irq_convert.hf.causal_lm import (
    check_device,
    load_causal_lm,
    load_config,
    load_tokenizer,
    require_causal_lm,
)
from irq_convert.jobs.common.options import chosen
from irq_convert.jobs.common.text import cut_windows, encode_stream, read_text, split_text
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.report import EvalReport
from irq_convert.jobs.evaluate.windows import evaluate_windows
from irq_convert.progress import Progress
from irq_convert.remote_code import remote_code

LONGEST_DEFAULT_CONTEXT = 2048


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    adapter: str | Path | CheckedAdapter | None = None,
    against: str | Path | None = None,
    tokenizer: str | Path | None = None,
    any_base: bool = False,
    options: EvalOptions | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> EvalReport:
    """Evaluate a model (folder or Hub id) on a text file, alone or against another.

    `options`, or single `settings` of `EvalOptions` (`context=512`). With `adapter`, a folder or
    what `check_adapter` returned for it, it is put on the model first, and must have been trained
    on it unless `any_base`.
    Everything cheap is checked before weights are loaded. Without `tokenizer` each model must
    bring one, and the two must have the same vocabulary; with it, it serves both models.

    Raises `UsageError` where options, text and models do not fit together; `IrqError` where a file
    or model cannot be read, or a model gives NaN or infinite logits.
    """
    options = chosen(EvalOptions, options, settings)
    check_device(options.device)
    if adapter is not None and not isinstance(adapter, CheckedAdapter):
        adapter = check_adapter(adapter, model, any_base)
    with remote_code(options.trust_remote_code):
        return _evaluate(model, text, adapter, against, tokenizer, options, progress)


def _evaluate(
    model: str | Path,
    text: str | Path,
    adapter: CheckedAdapter | None,
    against: str | Path | None,
    tokenizer: str | Path | None,
    options: EvalOptions,
    progress: Progress | None,
) -> EvalReport:
    kept = split_text(read_text(text), options.from_fraction)[1]
    sources = [model] if against is None else [model, against]
    configs = [load_config(source) for source in sources]
    for source, config in zip(sources, configs, strict=True):
        require_causal_lm(source, config)
    context = choose_context(configs, options.context)
    encoder = load_tokenizer(tokenizer or model)
    if against is not None and tokenizer is None:
        require_one_vocabulary(encoder, load_tokenizer(against))
    windows = cut_windows(encode_stream(encoder, kept, options.max_tokens), context)
    dtype = getattr(torch, options.dtype)
    loaded = [load_causal_lm(source, dtype, options.device) for source in sources]
    reference = None if against is None else loaded[1]
    measured = loaded[0] if adapter is None else put_on(loaded[0], adapter)
    return evaluate_windows(measured, windows, options, reference, progress)


def choose_context(configs: list[Any], asked: int | None) -> int:
    """Window length: the one asked for, else what every model can take, at most 2048.

    Raises `UsageError` where more is asked for than a model has positions.
    """
    positions = [getattr(c.get_text_config(), "max_position_embeddings", None) for c in configs]
    most = min((p for p in positions if p is not None and p > 0), default=None)
    if asked is None:
        return min(most or LONGEST_DEFAULT_CONTEXT, LONGEST_DEFAULT_CONTEXT)
    if most is not None and asked > most:
        raise UsageError(f"a context of {asked} tokens is more than the model's {most} positions")
    return asked


def require_one_vocabulary(tokenizer: Any, other: Any) -> None:
    """Raise UsageError unless both tokenizers give every token the same id."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    different = len(ours.items() ^ theirs.items())
    raise UsageError(
        f"the tokenizers differ: {len(ours)} tokens for the model, {len(theirs)} for the reference,"
        f" {different} entries unlike; compare models with one vocabulary, or, if it is one, name "
        "its tokenizer with --tokenizer PATH"
    )
