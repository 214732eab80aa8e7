"""What an evaluation found: the numbers of one model, and of the comparison with a reference."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

import torch
from torch import Tensor

from irq_convert.jobs.common.metrics import TokenScores, perplexity, ratio_estimate


@dataclass(frozen=True)
class WindowSums:
    """Totals of the token scores over one window; the last three are None without a reference."""

    tokens: int
    nll: float
    reference_nll: float | None = None
    kl: float | None = None
    agree: float | None = None

    @classmethod
    def of(cls, scores: TokenScores) -> "WindowSums":
        """Add up the scores of one window's tokens."""
        return cls(
            tokens=len(scores.nll),
            nll=float(scores.nll.sum()),
            reference_nll=_total(scores.reference_nll),
            kl=_total(scores.kl),
            agree=_total(scores.agree),
        )


@dataclass(frozen=True)
class EvalReport:
    """Perplexity of a model and, against a reference, how far its predictions moved.

    Every standard error (`_se`) is that of the figure over texts of this kind, by window (see
    `metrics.ratio_estimate`); None when there is one window only.

    Attributes:
        tokens: predicted tokens, `context - 1` a window.
        windows, context: number of windows and tokens in each (the last may be shorter).
        nll: mean negative log-likelihood, nats a token.
        perplexity: exp(nll).
        bits_per_token: nll / ln 2.
        kl: mean KL(reference || model), nats a token. None without a reference, as all below.
        top1: share of tokens where both models put the same token first, 0 to 1.
        reference_nll, reference_perplexity: the reference's own.
        nll_difference: mean of nll minus the reference's, token by token: its error is far
            smaller than that of either, because the two rise and fall with the same text.
    """

    tokens: int
    windows: int
    context: int
    nll: float
    nll_se: float | None
    perplexity: float
    perplexity_se: float | None
    bits_per_token: float
    kl: float | None = None
    kl_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    reference_nll: float | None = None
    reference_nll_se: float | None = None
    reference_perplexity: float | None = None
    reference_perplexity_se: float | None = None
    nll_difference: float | None = None
    nll_difference_se: float | None = None

    @property
    def compared(self) -> bool:
        """Whether there was a reference."""
        return self.kl is not None

    def to_dict(self) -> dict[str, int | float | None]:
        """Fields ready for JSON: comparison fields only if compared, infinities as None."""
        shown = [f.name for f in fields(self) if self.compared or f.default is MISSING]
        values = {name: getattr(self, name) for name in shown}
        return {name: finite_or_none(value) for name, value in values.items()}


def finite_or_none(value: float | None) -> float | None:
    """`value` as JSON can hold it."""
    return value if value is None or math.isfinite(value) else None


def summarize_windows(sums: Sequence[WindowSums], context: int) -> EvalReport:
    """Turn the totals of all windows (at least one) into means with standard errors."""
    counts = torch.tensor([row.tokens for row in sums])
    nll_sums = _column(sums, "nll")
    nll = ratio_estimate(nll_sums, counts)
    ppl = perplexity(nll)
    comparison: dict[str, float | None] = {}
    if sums[0].kl is not None:
        reference_sums = _column(sums, "reference_nll")
        reference_nll = ratio_estimate(reference_sums, counts)
        named = {
            "kl": ratio_estimate(_column(sums, "kl"), counts),
            "top1": ratio_estimate(_column(sums, "agree"), counts),
            "reference_nll": reference_nll,
            "reference_perplexity": perplexity(reference_nll),
            "nll_difference": ratio_estimate(nll_sums - reference_sums, counts),
        }
        comparison = {name: estimate.value for name, estimate in named.items()}
        comparison |= {f"{name}_se": estimate.se for name, estimate in named.items()}
    return EvalReport(
        tokens=int(counts.sum()),
        windows=len(sums),
        context=context,
        nll=nll.value,
        nll_se=nll.se,
        perplexity=ppl.value,
        perplexity_se=ppl.se,
        bits_per_token=nll.value / math.log(2),
        **comparison,
    )


def _total(scores: Tensor | None) -> float | None:
    return None if scores is None else float(scores.sum())


def _column(sums: Sequence[WindowSums], name: str) -> Tensor:
    return torch.tensor([getattr(row, name) for row in sums], dtype=torch.float64)
