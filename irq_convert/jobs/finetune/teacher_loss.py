"""KL(teacher || student) from what is kept of a teacher: its top k tokens, and the rest as one.

At a token the teacher has k + 1 buckets: its k most likely tokens, and all others together. With p
the teacher's masses, q the student's and l the student's logits,

    KL      = sum_top p_v (log p_v - log q_v) + p_rest (log p_rest - log q_rest)
    dKL/dl  = q_v - p_v at the top,  q_v (q_rest - p_rest) / q_rest elsewhere

which is KL of the whole distributions where k is the vocabulary, and less than it otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irq_convert.jobs.finetune.encode import IGNORED
from irq_convert.jobs.finetune.loss import Measure

IDS, LOG_P = "teacher_ids", "teacher_log_p"
CHUNK_ELEMENTS = 1 << 22
"""Logits that are widened at once: 16 MiB in float32."""


@dataclass(frozen=True)
class Taught:
    """What the teacher says of a batch.

    `ids` int32 `[batch, T - 1, k]` and `log_p` `[batch, T - 1, k + 1]`, the last the rest's, at the
    positions that have a next one; `labels` int64 `[batch, T]`; `counts` are the positions of each
    example, behind which all is padding.
    """

    ids: Tensor
    log_p: Tensor
    labels: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> Taught:
        """From a batch of `TaughtCollator`, whose teacher's part it takes out."""
        lengths = batch["attention_mask"].sum(1).tolist()
        counts = tuple(int(length) - 1 for length in lengths)
        return cls(batch.pop(IDS), batch.pop(LOG_P), batch.pop("labels"), counts)

    def parts(self, vocabulary: int) -> Iterator[tuple[int, slice]]:
        """Rows and positions, a few at a time."""
        step = max(1, CHUNK_ELEMENTS // vocabulary)
        for row, count in enumerate(self.counts):
            for start in range(0, count, step):
                yield row, slice(start, min(count, start + step))

    def buckets(self, row: int, part: slice) -> tuple[Tensor, Tensor]:
        """Token ids int64 `[t, k]`, and log-masses float32 `[t, k + 1]` that add up to one."""
        log_p = self.log_p[row, part].float()
        return self.ids[row, part].long(), log_p - log_p.logsumexp(1, keepdim=True)

    def targets(self, row: int, part: slice) -> tuple[Tensor, Tensor]:
        """The next tokens int64 `[t, 1]`, 0 where none is learned, and float32 which are."""
        labels = self.labels[row, 1:][part, None]
        learned = labels != IGNORED
        return labels.masked_fill(~learned, 0), learned.float()


@dataclass(frozen=True)
class _Student:
    """The student's side of some positions, float32: logits, and three logs of sums of them."""

    logits: Tensor
    top: Tensor
    whole: Tensor
    rest: Tensor

    @classmethod
    def of(cls, logits: Tensor, ids: Tensor) -> _Student:
        """`logits` `[t, V]` in any dtype; `top` is `[t, k]`, the others `[t, 1]`."""
        wide = logits.float()
        others = wide.scatter(1, ids, -torch.inf)
        return cls(
            wide, wide.gather(1, ids), wide.logsumexp(1, keepdim=True),
            others.logsumexp(1, keepdim=True),
        )  # fmt: skip

    @property
    def log_q(self) -> Tensor:
        """Log-masses of the buckets, `[t, k + 1]`."""
        return torch.cat([self.top, self.rest], 1) - self.whole


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Of each row; a bucket without mass counts nothing, whatever the student gives it."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)


class _Sums(torch.autograd.Function):
    """Sums over each example: KL in nats, and negative log-likelihood of the learned tokens.

    Beside the logits one tensor of their size is made, their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, taught: Taught) -> tuple[Tensor, Tensor]:
        """Float64 `[batch]` twice from `logits` `[batch, T, V]`."""
        kl, nll = torch.zeros(2, len(logits), dtype=torch.float64, device=logits.device)
        for row, part in taught.parts(logits.shape[-1]):
            ids, log_p = taught.buckets(row, part)
            student = _Student.of(logits[row, part], ids)
            target, learned = taught.targets(row, part)
            kl[row] += _kl(log_p, student.log_q).sum(dtype=torch.float64)
            missed = (student.whole - student.logits.gather(1, target)) * learned
            nll[row] += missed.sum(dtype=torch.float64)
        ctx.save_for_backward(logits)
        ctx.taught = taught
        return kl, nll

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        taught: Taught = ctx.taught
        of_kl, of_nll = (each.float() for each in above)
        found = torch.zeros_like(logits)
        for row, part in taught.parts(logits.shape[-1]):
            ids, log_p = taught.buckets(row, part)
            student = _Student.of(logits[row, part], ids)
            target, learned = taught.targets(row, part)
            p, q = log_p.exp(), student.log_q.exp()
            a, b = of_kl[row], of_nll[row] * learned
            slope = a * (q - p) + b * q
            # exp(l - rest) is at most 1 where it counts, and overwritten at the top.
            piece = (student.logits - student.rest).exp_().mul_(slope[:, -1:])
            piece.scatter_(1, ids, slope[:, :-1]).scatter_add_(1, target, -b)
            found[row, part] = piece.to(logits.dtype)
        return found, None


def taught_sums(logits: Tensor, taught: Taught) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), and the labels' negative log-likelihood, summed over each example.

    `logits` `[batch, T, V]`; both `[batch]`, nats, with gradients.
    """
    found: tuple[Tensor, Tensor] = _Sums.apply(logits, taught)
    return found


def _score(model: Any, batch: dict[str, Tensor]) -> Tensor:
    moved = {name: value.to(model.device) for name, value in batch.items()}
    taught = Taught.of(moved)
    return taught_sums(model(**moved, use_cache=False).logits, taught)[0].to("cpu", torch.float64)


KL = Measure(_score, lambda example: len(example.ids) - 1)
"""KL to the teacher, over all tokens that follow another."""
