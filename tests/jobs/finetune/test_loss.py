"""The held-out loss against transformers' own, and what measuring leaves behind."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from irq_convert.jobs.finetune.encode import IGNORED, Collator, Example
from irq_convert.jobs.finetune.loss import Loss, measure_loss
from tests.tiny import tiny_model


def examples(lengths: list[int]) -> list[Example]:
    torch.manual_seed(1)
    found = []
    for length in lengths:
        ids = torch.randint(80, (length,))
        labels = ids.clone()
        labels[: length // 3] = IGNORED
        found.append(Example(ids, labels))
    return found


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_mean_is_over_tokens_not_over_batches(batch: int) -> None:
    model, some = tiny_model().train(), examples([5, 40, 7, 12, 33, 2, 9])
    loss = measure_loss(model, some, Collator(0), batch, compute=nullcontext)
    assert model.training
    total = tokens = 0.0
    model.eval()
    for at, example in enumerate(some):
        with torch.no_grad():
            found = model(input_ids=example.ids[None], labels=example.labels[None]).loss
        assert loss.counts[at] == example.learned
        assert loss.sums[at] == pytest.approx(float(found) * example.learned, rel=1e-5)
        total, tokens = total + loss.sums[at], tokens + example.learned
    assert loss.mean == pytest.approx(total / tokens, rel=1e-12)
    assert loss.finite


def test_a_change_has_a_smaller_error_than_its_parts() -> None:
    before = Loss((10.0, 30.0, 5.0), (5, 10, 5))
    after = Loss((9.0, 28.0, 4.0), (5, 10, 5))
    value, se = after.change_from(before)
    assert value == pytest.approx(-0.2)
    assert se is not None
    assert before.se is not None
    assert se < before.se / 10
    assert Loss((3.0,), (2,)).se is None


def test_what_is_not_finite_is_seen() -> None:
    assert not Loss((1.0, float("nan")), (1, 1)).finite
    assert not Loss((float("inf"), 1.0), (1, 1)).finite


def test_a_tick_can_end_it_and_the_model_trains_on() -> None:
    model = tiny_model().train()

    def tick(done: int, total: int) -> None:
        if done:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        measure_loss(model, examples([5, 5, 5]), Collator(0), 1, compute=nullcontext, tick=tick)
    assert model.training
