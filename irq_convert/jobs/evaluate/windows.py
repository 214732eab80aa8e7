"""Run one model, or two side by side, over windows of tokens and sum up what they predict."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.limits import check_vocabulary
from irq_convert.jobs.common.metrics import token_scores
from irq_convert.jobs.evaluate.options import EvalOptions
from irq_convert.jobs.evaluate.report import EvalReport, WindowSums, summarize_windows
from irq_convert.progress import Progress


def evaluate_windows(
    model: PreTrainedModel,
    windows: Sequence[Tensor],
    options: EvalOptions,
    reference: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Measure `model` on windows of token ids, and against `reference` where one is given.

    `windows` are int64 tensors of at least 2 ids each, as `text.cut_windows` makes them. Both
    models see the same batch before the next is started: at most one batch of logits of each is
    in memory. Models run in evaluation mode and get their own mode back afterwards. Of `options`
    only `batch_size` matters here: dtype and device are those of the models, the rest is in the
    windows. `progress` is told windows, as things and as size.

    Raises `UsageError` where an id lies outside a model's vocabulary, or the vocabularies of the
    two models differ in size; `IrqError` on a NaN or infinite logit (the window is named), or
    when the device is out of memory.
    """
    if not windows:
        raise UsageError("there are no windows to evaluate: give more text")
    models = [model] if reference is None else [model, reference]
    largest = torch.stack([window.max() for window in windows])
    for each in models:
        check_vocabulary(each, largest)
    sums: list[WindowSums] = []
    progress = progress or Progress()
    with _evaluating(models), torch.no_grad():
        progress.phase("windows", len(windows), len(windows))
        for batch in _batches(windows, options.batch_size):
            sums += _score_batch(models, torch.stack(batch), len(sums), len(windows))
            progress.advance(len(batch), len(batch))
    return summarize_windows(sums, context=len(windows[0]))


def _score_batch(
    models: Sequence[PreTrainedModel], ids: Tensor, done: int, total: int
) -> list[WindowSums]:
    """Sums of each window of `ids` `[batch, tokens]`; `done` windows came before, of `total`."""
    try:
        logits = [_logits(model, ids) for model in models]
    except torch.OutOfMemoryError as error:
        raise IrqError(
            f"out of device memory at window {done + 1} of {total} with {ids.shape[0]} windows "
            f"of {ids.shape[1]} tokens: lower --batch-size or --context"
        ) from error
    _check_widths([part.shape[-1] for part in logits])
    return [
        _score_window([part[row] for part in logits], ids[row], f"{done + row + 1} of {total}")
        for row in range(len(ids))
    ]


def _score_window(logits: Sequence[Tensor], ids: Tensor, where: str) -> WindowSums:
    """Sums of one window from `[tokens, vocabulary]` logits: row t predicts id t + 1."""
    scores = token_scores(logits[0][:-1], ids[1:], *(part[:-1] for part in logits[1:]))
    for who, nll in (("model", scores.nll), ("reference model", scores.reference_nll)):
        if nll is not None and bool(nll.isnan().any()):
            raise IrqError(
                f"the {who} gives NaN or infinite logits in window {where}: "
                "try --dtype float32, or check its weights"
            )
    return WindowSums.of(scores)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits


def _batches(windows: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Consecutive windows of equal length, at most `size` together."""
    batch: list[Tensor] = []
    for window in windows:
        if batch and (len(batch) == size or len(batch[0]) != len(window)):
            yield batch
            batch = []
        batch.append(window)
    yield batch


@contextmanager
def _evaluating(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


def _check_widths(widths: Sequence[int]) -> None:
    if len(set(widths)) > 1:
        raise UsageError(
            f"the vocabularies differ: logits over {widths[0]} tokens for the model, {widths[1]} "
            "for the reference; only models with one vocabulary compare, evaluate each alone"
        )
