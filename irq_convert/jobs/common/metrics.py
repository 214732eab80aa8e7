"""The mathematics of an evaluation, on tensors: scores of each token from logits, and a mean with
its standard error from the sums of each window."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # logits widened at once: 16 MiB in float64, whatever the vocabulary


@dataclass(frozen=True)
class TokenScores:
    """Scores of T predicted tokens, each a `[T]` tensor; the last three only with a reference.

    A row of logits that holds a NaN or an infinity scores NaN.

    Attributes:
        nll: negative log-likelihood of the target, nats.
        reference_nll: the same for the reference.
        kl: KL(reference || model), nats.
        agree: 1 where both put the same token first, else 0. Among equal logits the lowest
            token id is first.
    """

    nll: Tensor
    reference_nll: Tensor | None = None
    kl: Tensor | None = None
    agree: Tensor | None = None


def token_scores(logits: Tensor, targets: Tensor, reference: Tensor | None = None) -> TokenScores:
    """Score the prediction of `targets` `[T]` (int64) by `logits` `[T, V]`, of any float dtype.

    With `reference` logits `[T, V]` also compare the two distributions:
    KL_t = sum_v p_tv (log p_tv - log q_tv), p the reference's and q the model's softmax.

    Softmax is taken in float64 (float32 on MPS, which has no float64), a few rows at a time: the
    extra memory is a small multiple of `CHUNK_ELEMENTS` and does not grow with T or V.

    Raises `ValueError` where the shapes of `logits`, `targets` and `reference` do not fit together.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit targets {tuple(targets.shape)}")
    if reference is not None and reference.shape != logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, reference {tuple(reference.shape)}")
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    targets = targets.to(logits.device)[:, None]
    # Filled in place: small results allocated between the large temporaries would pin each of
    # those to its own stretch of the heap, and memory would grow with T after all.
    nll, reference_nll, kl, agree = torch.empty(
        4, len(logits), dtype=_wide(logits), device=logits.device
    )
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        log_q, first_q = _log_softmax(logits[part])
        nll[part] = -log_q.gather(1, targets[part])[:, 0]
        if reference is not None:
            log_p, first_p = _log_softmax(reference[part].to(logits.device))
            reference_nll[part] = -log_p.gather(1, targets[part])[:, 0]
            agree[part] = (first_p == first_q).to(agree.dtype)
            kl[part] = log_p.exp().mul_(log_p.sub_(log_q)).sum(1)
    if reference is None:
        return TokenScores(nll)
    return TokenScores(nll, reference_nll, kl, agree)


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[t, V]`, NaN in rows with a non-finite logit, and the first tokens `[t]`.

    The sum of a row is finite exactly when each of its logits is.
    """
    wide = logits.to(_wide(logits))
    broken = ~torch.isfinite(wide.sum(1, keepdim=True))
    return torch.log_softmax(wide, 1).masked_fill_(broken, math.nan), logits.argmax(1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.device.type == "mps" else torch.float64


@dataclass(frozen=True)
class MeanEstimate:
    """A mean and its standard error; None where one window alone says nothing about its spread."""

    value: float
    se: float | None


def ratio_estimate(sums: Tensor, counts: Tensor) -> MeanEstimate:
    """Mean per token, and its standard error with the window as the sampling unit.

    `sums` `[W]`: total of a score over each window; `counts` `[W]`: its tokens. The mean is
    R = sum S_w / sum n_w.

    Tokens of one window share a story, a style and each other's context, so their scores are
    correlated: treating them as independent understates the error. Windows are taken as the
    independent draws instead, and R, a ratio of two sums over windows (the last one may be
    shorter), gets the linearised (cluster-robust) variance

        se^2 = W / (W - 1) * sum_w (S_w - R n_w)^2 / (sum_w n_w)^2.

    It is the error from the choice of text, not from training. What correlates *across* windows
    is not in it: a passage that runs on into the next one adds some percent; a file whose parts
    differ in kind (easy first half, hard second) is no sample of one kind of text, and its error
    is then much too small.
    """
    sums, counts = sums.to(torch.float64), counts.to(torch.float64)
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    units = len(sums)
    if units < 2:
        return MeanEstimate(mean, None)
    residual = sums - mean * counts
    variance = units / (units - 1) * float(residual.square().sum()) / total**2
    return MeanEstimate(mean, math.sqrt(variance))


def perplexity(nll: MeanEstimate) -> MeanEstimate:
    """exp of the mean NLL; by the delta method its standard error is exp(nll) * se(nll).

    A mean NLL beyond the range of a double (about 709 nats) gives infinity.
    """
    try:
        value = math.exp(nll.value)
    except OverflowError:
        value = math.inf
    return MeanEstimate(value, None if nll.se is None else value * nll.se)
