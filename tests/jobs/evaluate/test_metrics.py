"""Scores of tokens against numpy in float64, standard errors against simulation."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.jobs.common import metrics
from irq_convert.jobs.common.metrics import MeanEstimate, perplexity, ratio_estimate, token_scores


def oracle(logits: np.ndarray) -> np.ndarray:
    """Softmax in extended precision, the plain definition."""
    exponentials = np.exp(logits.astype(np.longdouble) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_scores_agree_with_the_definition(
    seed: int, tokens: int, vocabulary: int, spread: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, reference = (
        (torch.randn(2, tokens, vocabulary, generator=generator) * spread).to(dtype).unbind()
    )
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    scores = token_scores(logits, targets, reference)
    q, p = oracle(logits.double().numpy()), oracle(reference.double().numpy())
    rows = np.arange(tokens)
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(scores.nll, -np.log(q[rows, targets]).astype(float), **close)
    np.testing.assert_allclose(
        scores.reference_nll, -np.log(p[rows, targets]).astype(float), **close
    )
    kl = (p * (np.log(p) - np.log(q))).sum(1).astype(float)
    np.testing.assert_allclose(scores.kl, kl, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(scores.agree, logits.argmax(1) == reference.argmax(1))
    assert scores.nll.dtype == torch.float64


def test_chunks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, reference = torch.randn(2, 23, 50, generator=generator).unbind()
    targets = torch.randint(50, (23,), generator=generator)
    whole = token_scores(logits, targets, reference)
    for elements in (1, 120, 50 * 22):
        monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", elements)
        parts = token_scores(logits, targets, reference)
        for name in ("nll", "reference_nll", "kl", "agree"):
            assert torch.equal(getattr(parts, name), getattr(whole, name)), name


@pytest.mark.slow
def test_memory_does_not_grow_with_the_logits() -> None:
    """A process of its own: 2 x 500 MiB of logits, scored with at most 200 MiB more."""
    code = """
import resource, sys, torch
from irq_convert.jobs.common.metrics import token_scores
logits, reference = torch.randn(2, 1, 65536).repeat(1, 2000, 1).unbind()
targets = torch.zeros(2000, dtype=torch.int64)
token_scores(logits[:2], targets[:2], reference[:2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
token_scores(logits, targets, reference)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 200 * 2**20


def test_a_distribution_against_itself_is_exactly_zero() -> None:
    logits = torch.randn(40, 97, generator=torch.Generator().manual_seed(0)) * 8
    scores = token_scores(logits, torch.zeros(40, dtype=torch.int64), logits.clone())
    assert torch.equal(scores.kl, torch.zeros(40, dtype=torch.float64))
    assert scores.agree.all()


def test_kl_is_of_the_reference_from_the_model() -> None:
    """Reference (1/2, 1/2), model (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3; the reverse is other."""
    model, reference = torch.tensor([[1.0, 3.0]]).log(), torch.zeros(1, 2)
    scores = token_scores(model, torch.tensor([0]), reference)
    assert scores.kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert scores.nll.item() == pytest.approx(math.log(4), rel=1e-6)
    assert scores.agree.item() == 0  # the reference's tie goes to the lowest id


def test_without_a_reference_nothing_is_compared() -> None:
    scores = token_scores(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
    assert scores.nll.tolist() == pytest.approx([math.log(4)] * 3)
    assert (scores.reference_nll, scores.kl, scores.agree) == (None, None, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", ["model", "reference"])
def test_rows_with_a_non_finite_logit_score_nan(bad: float, broken: str) -> None:
    logits, reference = torch.zeros(3, 5), torch.zeros(3, 5)
    (logits if broken == "model" else reference)[1, 4] = bad
    scores = token_scores(logits, torch.zeros(3, dtype=torch.int64), reference)
    nll = scores.nll if broken == "model" else scores.reference_nll
    assert nll.isnan().tolist() == [False, True, False]


def test_shapes_must_fit() -> None:
    targets = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit"):
        token_scores(torch.zeros(4, 5), targets)
    with pytest.raises(ValueError, match="reference"):
        token_scores(torch.zeros(3, 5), targets, torch.zeros(3, 6))


def test_equal_windows_give_the_textbook_error_of_their_means() -> None:
    sums = torch.tensor([3.0, 5.0, 10.0, 2.0, 6.5], dtype=torch.float64)
    found = ratio_estimate(sums, torch.full((5,), 4))
    means = sums.numpy() / 4
    assert found.value == pytest.approx(means.mean())
    assert found.se == pytest.approx(means.std(ddof=1) / math.sqrt(5))


def test_unequal_windows_against_the_formula_by_hand() -> None:
    """S = (2, 9), n = (1, 3): R = 11/4, residuals -3/4 and 3/4, se^2 = 2 * (18/16) / 16."""
    found = ratio_estimate(torch.tensor([2.0, 9.0]), torch.tensor([1, 3]))
    assert found.value == 2.75
    assert found.se == pytest.approx(math.sqrt(2 * 18 / 16 / 16))


def test_one_window_has_no_standard_error() -> None:
    assert ratio_estimate(torch.tensor([6.0]), torch.tensor([4])) == MeanEstimate(1.5, None)
    assert perplexity(MeanEstimate(0.0, None)) == MeanEstimate(1.0, None)


def simulate(seed: int, windows: int, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores with a random part shared by each window: `[trials, windows]` sums, and counts.

    True mean 2; within a window the correlation is 0.5^2 / (0.5^2 + 1). The last window is short.
    """
    generator = np.random.default_rng(seed)
    counts = np.full(windows, 20)
    counts[-1] = 7
    shared = 0.5 * generator.standard_normal((trials, windows))
    noise = generator.standard_normal((trials, windows)) * np.sqrt(counts)
    return counts * (2 + shared) + noise, counts


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intervals_cover_the_truth_as_often_as_they_say(seed: int) -> None:
    """Nominal 95 %; with 60 windows a normal interval covers about 94 %, +- 0.5 % at 2000 trials.

    Independent tokens would give an error 2.2 times too small and cover about 62 %.
    """
    sums, counts = simulate(seed, windows=60, trials=2000)
    of_mean = of_perplexity = 0
    for row in sums:
        found = ratio_estimate(torch.from_numpy(row), torch.from_numpy(counts))
        assert found.se is not None
        of_mean += abs(found.value - 2) < 1.96 * found.se
        ppl = perplexity(found)
        assert ppl.se is not None
        of_perplexity += abs(ppl.value - math.exp(2)) < 1.96 * ppl.se
    assert 0.92 < of_mean / 2000 < 0.97
    assert 0.92 < of_perplexity / 2000 < 0.97


def test_standard_errors_match_the_spread_of_repeated_experiments() -> None:
    sums, counts = simulate(5, windows=80, trials=3000)
    found = [ratio_estimate(torch.from_numpy(row), torch.from_numpy(counts)) for row in sums]
    values = np.array([estimate.value for estimate in found])
    errors = np.array([estimate.se for estimate in found])
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.05)
    perplexities = [perplexity(estimate) for estimate in found]
    spread = np.std([p.value for p in perplexities], ddof=1)
    assert np.mean([p.se for p in perplexities]) == pytest.approx(spread, rel=0.05)


def test_perplexity_beyond_a_double_is_infinite() -> None:
    assert perplexity(MeanEstimate(1e4, 1.0)) == MeanEstimate(math.inf, math.inf)
