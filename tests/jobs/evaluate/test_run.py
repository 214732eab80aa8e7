"""`evaluate_windows` on real, tiny transformers models."""

import dataclasses
import json
import math
from typing import ClassVar

import pytest
import torch
from transformers import LlamaForCausalLM

from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.common.text import cut_windows
from irq_convert.jobs.evaluate.windows import EvalOptions, evaluate_windows
from irq_convert.progress import Progress

from .conftest import NOISE, make_model

OPTIONS = EvalOptions()


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    """Nine full windows of 16 tokens and one of 5."""
    ids = torch.randint(300, (9 * 16 + 5,), generator=torch.Generator().manual_seed(2))
    return cut_windows(ids, 16)


def losses(model: LlamaForCausalLM, windows: list[torch.Tensor]) -> list[float]:
    """The loss transformers itself returns for each window: a mean over its predictions."""
    with torch.no_grad():
        return [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]


def test_nll_is_the_loss_of_transformers(windows: list[torch.Tensor]) -> None:
    model = make_model(0)
    result = evaluate_windows(model, windows, OPTIONS)
    weights = [len(w) - 1 for w in windows]
    expected = sum(map(math.prod, zip(losses(model, windows), weights, strict=True))) / sum(weights)
    assert result.nll == pytest.approx(expected, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.bits_per_token == pytest.approx(expected / math.log(2), rel=1e-6)
    assert (result.tokens, result.windows, result.context) == (9 * 15 + 4, 10, 16)
    assert result.nll_se is not None
    assert result.nll_se > 0
    assert not result.compared


def test_a_comparison_is_that_of_the_whole_logits(windows: list[torch.Tensor]) -> None:
    model, reference = make_model(0), make_model(0, NOISE)
    result = evaluate_windows(model, windows, OPTIONS, reference)
    logs: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for which, each in enumerate((model, reference)):
            for window in windows:
                logits = each(input_ids=window[None]).logits[0, :-1].double()
                logs[which].append(logits.log_softmax(-1))
    log_q, log_p = (torch.cat(part) for part in logs)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert result.kl == pytest.approx(float(kl), rel=1e-6)
    agree = (log_q.argmax(1) == log_p.argmax(1)).double().mean()
    assert result.top1 == pytest.approx(float(agree))
    assert 0 < result.top1 < 1
    alone = evaluate_windows(reference, windows, OPTIONS)
    assert result.reference_nll == pytest.approx(alone.nll)
    assert result.reference_perplexity == pytest.approx(alone.perplexity)
    assert result.reference_nll_se == pytest.approx(alone.nll_se)
    assert result.nll_difference == pytest.approx(result.nll - alone.nll)


def test_a_model_against_itself(windows: list[torch.Tensor]) -> None:
    model = make_model(0)
    result = evaluate_windows(model, windows, OPTIONS, model)
    assert (result.kl, result.kl_se) == (0.0, 0.0)
    assert (result.top1, result.top1_se) == (1.0, 0.0)
    assert (result.nll_difference, result.nll_difference_se) == (0.0, 0.0)
    assert result.reference_perplexity == result.perplexity


def test_pairing_makes_the_difference_sharper(windows: list[torch.Tensor]) -> None:
    """A model next to the reference: the two rise and fall together."""
    model, reference = make_model(0), make_model(0, noise=1e-4)
    result = evaluate_windows(model, windows, OPTIONS, reference)
    assert result.nll_se is not None
    assert result.nll_difference_se is not None
    assert 0 < result.nll_difference_se < result.nll_se / 20


@pytest.mark.parametrize("size", [2, 4, 100])
def test_the_batch_size_does_not_matter(windows: list[torch.Tensor], size: int) -> None:
    model, reference = make_model(0), make_model(0, NOISE)
    single = evaluate_windows(model, windows, OPTIONS, reference)
    batched = evaluate_windows(model, windows, EvalOptions(batch_size=size), reference)
    for name, value in single.to_dict().items():
        assert getattr(batched, name) == pytest.approx(value, rel=1e-4), name


def test_batches_hold_as_many_windows_as_asked(windows: list[torch.Tensor]) -> None:
    model = make_model(0)
    seen: list[tuple[int, int]] = []
    caches: set[bool] = set()

    def note(module: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))
        caches.add(bool(kwargs["use_cache"]))

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)

    class Listener(Progress):
        calls: ClassVar[list[tuple[int, int]]] = []

        def phase(self, text: str, things: int, size: int) -> None:
            self.calls.append((things, size))

        def advance(self, size: int, finished: int) -> None:
            self.calls.append((finished, size))

    evaluate_windows(model, windows, EvalOptions(batch_size=4), progress=Listener())
    hook.remove()
    assert caches == {False}  # keys and values of one pass serve nobody
    assert seen == [(4, 16), (4, 16), (1, 16), (1, 5)]
    assert Listener.calls == [(10, 10), (4, 4), (4, 4), (1, 1), (1, 1)]


def test_dropout_is_off_and_the_mode_comes_back(windows: list[torch.Tensor]) -> None:
    training, still = make_model(0).train(), make_model(0, NOISE)
    expected = evaluate_windows(make_model(0), windows, OPTIONS).nll
    assert evaluate_windows(training, windows, OPTIONS, still).nll == expected
    assert training.training
    assert not still.training
    with torch.no_grad():
        still.lm_head.weight[0] = math.nan
    with pytest.raises(IrqError):
        evaluate_windows(training, windows, OPTIONS, still)
    assert training.training


def test_the_error_is_by_window() -> None:
    """The same window twice as often: the mean stays, the error shrinks by the number of units."""
    model = make_model(0)
    ids = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(4))
    once = evaluate_windows(model, list(ids), OPTIONS)
    twice = evaluate_windows(model, [*ids, *ids], OPTIONS)
    assert twice.nll == pytest.approx(once.nll)
    assert twice.nll_se == pytest.approx(once.nll_se * math.sqrt(7 / 15))
    one = evaluate_windows(model, [ids[0]], OPTIONS, model)
    assert (one.nll_se, one.perplexity_se, one.kl_se, one.top1_se) == (None,) * 4


def test_results_are_json(windows: list[torch.Tensor]) -> None:
    model = make_model(0)
    alone = json.loads(
        json.dumps(evaluate_windows(model, windows, OPTIONS).to_dict(), allow_nan=False)
    )
    both = evaluate_windows(model, windows, OPTIONS, make_model(0, NOISE))
    compared = json.loads(json.dumps(both.to_dict(), allow_nan=False))
    assert {"kl", "kl_se", "top1", "nll_difference", "reference_perplexity"} <= set(compared)
    assert set(alone) < set(compared)
    assert "kl" not in alone
    assert compared["kl"] == both.kl
    single = evaluate_windows(model, windows[:1], OPTIONS).to_dict()
    assert single["nll_se"] is None
    huge = dataclasses.replace(both, perplexity=math.inf)
    assert huge.to_dict()["perplexity"] is None


@pytest.mark.parametrize("who", ["model", "reference model"])
def test_broken_logits_name_the_window(windows: list[torch.Tensor], who: str) -> None:
    """The token that first appears as input in window 3 of these has an infinite embedding."""
    first = next(int(t) for t in windows[2][1:] if all(t not in w for w in windows[:2]))
    broken, good = make_model(0), make_model(0, NOISE)
    with torch.no_grad():
        broken.model.embed_tokens.weight[first] = math.inf
    pair = (broken, good) if who == "model" else (good, broken)
    for size in (1, 4):
        with pytest.raises(IrqError) as caught:
            evaluate_windows(pair[0], windows, EvalOptions(batch_size=size), pair[1])
        says = f"the {who} gives NaN or infinite logits in window 3 of 10: "
        assert str(caught.value).startswith(says)


def test_vocabularies_must_have_one_size(windows: list[torch.Tensor]) -> None:
    with pytest.raises(UsageError, match=r"300 tokens for the model, 320 for the reference"):
        evaluate_windows(make_model(0), windows, OPTIONS, make_model(0, vocabulary=320))


def test_ids_must_lie_in_the_vocabulary(windows: list[torch.Tensor]) -> None:
    with pytest.raises(UsageError, match=r"gives id \d+, but the model's embedding has 200 rows"):
        evaluate_windows(make_model(0, vocabulary=200), windows, OPTIONS)


def test_no_windows() -> None:
    with pytest.raises(UsageError, match="no windows"):
        evaluate_windows(make_model(0), [], OPTIONS)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"context": 1}, "context is 1"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"max_tokens": 1}, "max tokens is 1"),
        ({"from_fraction": 1.0}, "from fraction is 1.0"),
        ({"from_fraction": -0.1}, "from fraction is -0.1"),
        ({"from_fraction": math.nan}, "from fraction is nan"),
        ({"dtype": "int8"}, "--dtype int8: choose one of float32"),
    ],
)
def test_options_out_of_range(values: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        EvalOptions(**values)  # type: ignore[arg-type]
