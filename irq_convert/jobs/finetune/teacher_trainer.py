"""Training towards a teacher: what a batch has of it, and the loss of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irq_convert.jobs.finetune.encode import IGNORED, Collator, Example
from irq_convert.jobs.finetune.loss import Measure
from irq_convert.jobs.finetune.teacher_file import TaughtExample, TeacherLogits
from irq_convert.jobs.finetune.teacher_loss import IDS, KL, LOG_P, Taught, taught_sums
from irq_convert.jobs.finetune.trainer import AdapterTrainer


class TaughtCollator(Collator):
    """`Collator` that puts beside each example what the teacher says of it."""

    def __init__(self, pad: int, logits: TeacherLogits) -> None:
        super().__init__(pad)
        self._logits = logits

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """As `Collator`, with the teacher's `IDS` int32 `[batch, longest - 1, k]` and `LOG_P`
        float16 `[batch, longest - 1, k + 1]`; behind an example they are 0 and mean nothing."""
        batch = super().__call__(examples)
        count, longest = batch["input_ids"].shape
        k = self._logits.k
        batch[IDS] = torch.zeros(count, longest - 1, k, dtype=torch.int32)
        batch[LOG_P] = torch.zeros(count, longest - 1, k + 1, dtype=torch.float16)
        for row, example in enumerate(examples):
            assert isinstance(example, TaughtExample)
            ids, log_p = self._logits.rows(example.at, example.rows)
            batch[IDS][row, : example.rows] = ids
            batch[LOG_P][row, : example.rows] = log_p
        return batch


class TaughtTrainer(AdapterTrainer):
    """`AdapterTrainer` whose loss is w * KL(teacher || student) + (1 - w) * loss on labels.

    KL is the mean over all tokens of a step that follow another, the loss on labels that over
    those learned: in both over all its passes and processes, however these divide it.
    """

    measured_by: Measure = KL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Never called: it tells Trainer that a pass's loss is a share of the step's already.
        self.compute_loss_func = _share

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The batches of a step, and of all processes' the tokens for each of the two means."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            counts[0] += batch["attention_mask"][:, 1:].sum()
            counts[1] += batch["labels"][:, 1:].ne(IGNORED).sum()
        gathered: Tensor = self.accelerator.gather(counts[None])
        return batches, gathered.sum(0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This pass's share of the step's loss, times the processes, over which it is averaged."""
        taught = Taught.of(inputs)
        outputs = model(**inputs, use_cache=False)
        weight = self.recipe.teacher_weight
        assert weight is not None
        kl, nll = (each.sum() for each in taught_sums(outputs.logits, taught))
        tokens, learned = num_items_in_batch.clamp_min(1)
        loss = (weight * kl / tokens + (1 - weight) * nll / learned).float()
        loss = loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss


def _share(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the loss is computed by compute_loss")
