"""The whole job: from the names of models and a text file to an `EvalReport`."""

from pathlib import Path
from typing import Any

import torch

from irq_convert.adapters.put_on import CheckedAdapter
from irq_convert.adapters.runnable import check_runnable
from irq_convert.errors import UsageError
from irq_convert.hf.limits import longest_context
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
    bring one (an adapter may, for its base), and the two must have the same vocabulary; with it, it
    serves both models.

    Raises `UsageError` where options, text and models do not fit together; `IrqError` where a file
    or model cannot be read, or a model gives NaN or infinite logits.
    """
    options = chosen(EvalOptions, options, settings)
    with remote_code(options.trust_remote_code):
        kept = split_text(read_text(text), options.from_fraction)[1]
        models = check_runnable(
            model,
            adapter=adapter,
            against=against,
            tokenizer=tokenizer,
            any_base=any_base,
            device=options.device,
        )
        context = choose_context([each.config for each in models], options.context)
        encoder = models[0].tokenizer
        if against is not None and tokenizer is None:
            require_one_vocabulary(encoder, models[1].tokenizer)
        windows = cut_windows(encode_stream(encoder, kept, options.max_tokens), context)
        dtype = getattr(torch, options.dtype)
        loaded = [each.load(dtype, options.device) for each in models]
        return evaluate_windows(
            loaded[0], windows, options, None if against is None else loaded[1], progress
        )


def choose_context(configs: list[Any], asked: int | None) -> int:
    """Window length: the one asked for, else what every model can take, at most 2048.

    Raises `UsageError` where more is asked for than a model has positions.
    """
    most = min((p for p in map(longest_context, configs) if p is not None), default=None)
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
