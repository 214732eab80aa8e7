"""The loss of a model on examples: the mean over predicted tokens, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irq_convert.jobs.common.metrics import ratio_estimate, token_scores
from irq_convert.jobs.finetune.encode import IGNORED, Collator, Example


@dataclass(frozen=True)
class Loss:
    """What a `Measure` found, nats: `sums` over the `counts` tokens of each example."""

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Per token, over all tokens alike."""
        return math.fsum(self.sums) / sum(self.counts)

    @property
    def se(self) -> float | None:
        """Standard error of the mean with the example as the sampling unit."""
        return ratio_estimate(torch.tensor(self.sums), torch.tensor(self.counts)).se

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in self.sums)

    def change_from(self, before: Loss) -> tuple[float, float | None]:
        """Mean of this loss minus `before`'s on the same examples, and its standard error.

        The error is far smaller than that of either: both rise and fall with the same text.
        """
        sums = torch.tensor(self.sums, dtype=torch.float64)
        found = ratio_estimate(
            sums - torch.tensor(before.sums, dtype=torch.float64), torch.tensor(self.counts)
        )
        return found.value, found.se


@dataclass(frozen=True)
class Measure:
    """What is measured: `score` is its sum over each row of a batch, float64 `[batch]` on the CPU,
    from a model and what a collator made; `count` the tokens of an example that it is over."""

    score: Callable[[Any, dict[str, Tensor]], Tensor]
    count: Callable[[Example], int]


def measure_loss(
    model: Any,
    examples: Sequence[Example],
    collator: Collator,
    batch_size: int,
    *,
    compute: Callable[[], AbstractContextManager[Any]],
    rank: int = 0,
    processes: int = 1,
    tick: Callable[[int, int], None] = lambda done, total: None,
    measure: Measure | None = None,
) -> Loss:
    """Measure `model` on `examples`, in evaluation mode and without gradients; by their labels,
    or another `measure`.

    `compute` opens the context of a forward pass (autocast). Process `rank` of `processes` takes
    its share of the batches, and all get the whole answer. `tick(done, total)` is called with
    examples before each batch and at the end; what it raises ends the measurement.
    """
    measure = measure or LABELS
    # Alike in length, so that little is padding; the order of the answer is that of `examples`.
    order = sorted(range(len(examples)), key=lambda at: (len(examples[at].ids), at))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    sums = torch.zeros(len(examples), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for number, batch in enumerate(batches):
                tick(number * batch_size, len(examples))
                if number % processes != rank:
                    continue
                with compute():
                    sums[batch] = measure.score(model, collator([examples[at] for at in batch]))
    finally:
        model.train(was_training)
    tick(len(examples), len(examples))
    if processes > 1:
        sums = _add_up(sums, model.device)
    return Loss(tuple(sums.tolist()), tuple(map(measure.count, examples)))


def _score(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Sum over the predicted tokens of each row, float64 `[batch]`."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits
    targets = batch["labels"][:, 1:]
    return torch.stack([_row(logits[row, :-1], targets[row]) for row in range(len(targets))])


def _row(logits: Tensor, targets: Tensor) -> Tensor:
    wanted = targets != IGNORED
    scores = token_scores(logits[wanted.to(logits.device)], targets[wanted])
    return scores.nll.sum().to("cpu", torch.float64)


LABELS = Measure(_score, lambda example: example.learned)
"""Negative log-likelihood of the labels."""


def _add_up(sums: Tensor, device: torch.device) -> Tensor:
    shared = sums if device.type == "cpu" else sums.to(device)
    torch.distributed.all_reduce(shared)
    return shared.cpu()
