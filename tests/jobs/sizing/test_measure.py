"""Sensitivities against gradients of the whole model, by autograd and the formula written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.core.dequantize import dequantize_tensor
from irq_convert.core.quantize import quantize_tensor
from irq_convert.core.spec import QuantSpec
from irq_convert.hf.layered import open_layered
from irq_convert.jobs.calibration.sites import Rows, Site, StoredRows
from irq_convert.jobs.calibration.text import Windows
from irq_convert.jobs.sizing import backward, forward
from irq_convert.jobs.sizing.choices import Choice
from irq_convert.jobs.sizing.damage import damages, strata
from irq_convert.jobs.sizing.ends import Ends
from irq_convert.jobs.sizing.measure import Subject, compare, measure_sensitivity
from irq_convert.progress import Progress
from tests.architectures.zoo import BY_NAME, make_model
from tests.folders import change_json, open_without_a_name

Make = Callable[[str], Path]
CHOICES = (Choice("int2", 32), Choice("int3", 64), Choice("nf4", 32))
BASE = QuantSpec("int4", 64, "mse")


def subject(
    source: Path,
    ids: torch.Tensor,
    weigh: Any = "measured",
    held_out: int = 2,
    tables: bool = False,
) -> Subject:
    model = open_layered(open_checkpoint(source))
    names = tuple(
        name
        for name, info in model.source.checkpoint.tensors.items()
        if (".layers." in name or tables) and len(info.shape) > 1 and "gate.weight" not in name
    )
    return Subject(model, names, Windows(ids, held_out, "words"), BASE, weigh, seed=5, threads=1)


def drawn_ids(windows: int = 8, tokens: int = 16) -> torch.Tensor:
    return torch.randint(0, 96, (windows, tokens), generator=torch.Generator().manual_seed(1))


def by_autograd(model: Any, ids: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean squares of inputs and of the gradients of outputs of every linear layer."""
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, found: torch.Tensor) -> None:
            own = args[0].detach().double().reshape(-1, args[0].shape[-1])
            inputs[name] = inputs.get(name, 0) + own.square().sum(0)

            def heard(gradient: torch.Tensor) -> None:
                flat = gradient.double().reshape(-1, gradient.shape[-1])
                outputs[name] = outputs.get(name, 0) + flat.square().sum(0)

            found.register_hook(heard)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(f"{name}.weight"))
    generator = torch.Generator().manual_seed(5)
    for window in ids:
        logits = model(input_ids=window[None]).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    count = ids.numel()
    return (
        {name: found / count for name, found in inputs.items()},
        {name: found / count for name, found in outputs.items()},
    )


@pytest.mark.parametrize("weigh", ["measured", None])
def test_damage_is_half_the_fisher_weighted_error(
    make: Make, tmp_path: Path, weigh: str | None
) -> None:
    source, ids = make("Llama 3"), drawn_ids()
    found = measure_sensitivity(
        subject(source, ids, weigh), CHOICES, {"a": 1}, {"b": 2}, tmp_path, Progress()
    )
    model = make_model(BY_NAME["Llama 3"])
    inputs, outputs = by_autograd(model, ids[:6])
    checked = 0
    for name, values in found.damages.items():
        weight = model.get_parameter(name).detach()
        for choice, damage in zip(CHOICES, values, strict=True):
            spec = choice.spec(BASE)
            own = inputs[name].float() if weigh else None
            stored = dequantize_tensor(quantize_tensor(weight, spec, importance=own))
            error = (stored - weight).double().square()
            wanted = 0.5 * float(outputs[name] @ (error @ inputs[name]))
            assert damage == pytest.approx(wanted, rel=2e-3)
            checked += 1
    assert checked == 14 * 3
    assert found.choices == ("int2/32", "int3/64", "nf4/32")
    assert sorted(tmp_path.glob("source-*")) == [tmp_path / "source-00002"]


def squares_of_rows(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the embedding's gradient, token by token and scaled as its class does: f and g."""
    module = model.get_input_embeddings()
    rows: list[torch.Tensor] = []
    module.register_forward_hook(lambda _, args, found: rows.append(found) or found.retain_grad())
    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(module.weight.shape[1], dtype=torch.float64)
    scale = float(getattr(module, "embed_scale", 1.0))
    for window in ids:
        logits = model(input_ids=window[None]).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        total += (scale * rows.pop().grad[0].double()).square().sum(0)
    counts = torch.bincount(ids.flatten(), minlength=len(module.weight)).double()
    return counts / ids.numel(), total / ids.numel()


@pytest.mark.parametrize("name", ["Llama 2", "Llama 3", "Gemma 2"])
def test_damage_of_embeddings_and_heads(make: Make, tmp_path: Path, name: str) -> None:
    """The head's as of any linear, the embedding's by tokens; both where one tensor is both."""
    source, ids = make(name), drawn_ids()
    own = subject(source, ids, None, tables=True)
    found = measure_sensitivity(own, CHOICES, {"a": 1}, {"b": 2}, tmp_path, Progress())
    model, twin = make_model(BY_NAME[name]), make_model(BY_NAME[name])
    inputs, outputs = by_autograd(model, ids[:6])
    f, g = squares_of_rows(twin, ids[:6])
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    (key,) = (key for key in inputs if "lm_head" in key)
    tables = {id(embedding): embedding, id(head): head}
    ends = Ends.of(own.model, own.tensors)
    names = ends.first | ends.last
    assert len(names) == len(tables)
    for table in names:
        weight = head if "lm_head" in table else embedding
        for choice, damage in zip(CHOICES, found.damages[table], strict=True):
            stored = dequantize_tensor(quantize_tensor(weight.detach(), choice.spec(BASE)))
            error = (stored - weight.detach()).double().square()
            wanted = 0.5 * float(f @ (error @ g)) if weight is embedding else 0.0
            if weight is head:
                wanted += 0.5 * float(outputs[key] @ (error @ inputs[key]))
            # Tokens that are not in the text are left out, so statistics have other groups.
            assert damage == pytest.approx(wanted, rel=2e-2)


@pytest.mark.parametrize("name", ["Llama 2", "Gemma 2", "apart"])
def test_mixes_are_judged_with_their_ends(make: Make, tmp_path: Path, name: str) -> None:
    """Alone and together, of two tensors or one; "apart": the class ties what the files have."""
    kind = BY_NAME["Llama 2" if name == "apart" else name]
    source, ids = make(kind.name), drawn_ids()
    if name == "apart":
        change_json(source / "config.json", lambda found: found.update(tie_word_embeddings=True))
    own = subject(source, ids, None, tables=True)
    ends, spec = Ends.of(own.model, own.tensors), CHOICES[0].spec(BASE)
    mixes = {"first": ends.first, "last": ends.last, "all": set(own.tensors), "none": set()}
    specs = {
        mix: {tensor: spec if tensor in names else None for tensor in own.tensors}
        for mix, names in mixes.items()
    }
    found = compare(own, specs, tmp_path, Progress())
    for mix, names in mixes.items():
        models = make_model(kind), make_model(kind)
        with torch.no_grad():
            for tensor in names:
                weight = models[1].get_parameter(tensor)
                weight.copy_(dequantize_tensor(quantize_tensor(weight, spec)))
            logs = [m(input_ids=ids[6:]).logits[:, :-1].double().log_softmax(-1) for m in models]
        kl = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
        assert found[mix].value == pytest.approx(kl, rel=1e-3, abs=1e-12)
    assert (ends.first == ends.last) == (name == "Gemma 2")


def test_a_class_that_changes_its_embeddings_in_place(make: Make, tmp_path: Path) -> None:
    own = subject(make("GPT-NeoX"), drawn_ids(), None, tables=True)
    dropout = own.model.model.gpt_neox.emb_dropout
    dropout.register_forward_hook(lambda module, args, found: found.mul_(2.0))
    found = measure_sensitivity(own, CHOICES, {"a": 1}, {"b": 2}, tmp_path, Progress())
    (first,) = Ends.of(own.model, own.tensors).first
    assert found.damages[first][0] > 0


def test_widths_are_what_they_cost_in_truth(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, ids = make("Llama 2"), drawn_ids()
    held: list[list[str]] = []
    given: list[str] = []
    for module in (forward, backward):
        monkeypatch.setattr(module, "give_back_memory", partial(given.append, module.__name__))

    class Watching(Progress):
        def advance(self, size: int, finished: int) -> None:
            held.append(open_without_a_name(tmp_path))

    found = measure_sensitivity(
        subject(source, ids, None), CHOICES, {"a": 1}, {"b": 2}, tmp_path, Watching()
    )
    assert len(held) > 2
    assert not any(held)
    layers = len(open_layered(open_checkpoint(source)).layers)
    assert [given.count(each.__name__) for each in (forward, backward)] == [layers, layers]
    assert set(found.widths) == {2, 3, 4}
    model, twin = make_model(BY_NAME["Llama 2"]), make_model(BY_NAME["Llama 2"])
    with torch.no_grad():
        for name in found.damages:
            weight = twin.get_parameter(name)
            weight.copy_(dequantize_tensor(quantize_tensor(weight, CHOICES[0].spec(BASE))))
        logits = [
            m(input_ids=ids[6:]).logits[:, :-1].double().log_softmax(-1) for m in (model, twin)
        ]
    kl = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    assert found.widths[2].kl == pytest.approx(kl, rel=1e-3)
    assert found.widths[2].expected == pytest.approx(sum(v[0] for v in found.damages.values()))


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_experts_are_measured_by_the_tokens_that_reach_them(
    make: Make, tmp_path: Path, name: str
) -> None:
    found = measure_sensitivity(
        subject(make(name), drawn_ids(12)), CHOICES, {"a": 1}, {"b": 2}, tmp_path, Progress()
    )
    experts = [values for tensor, values in found.damages.items() if "expert" in tensor]
    assert len(experts) in (2 * 2, 2 * 4 * 3)  # stacks of all of a layer, or a tensor each
    assert sum(v[0] for v in experts) > sum(v[2] for v in experts) > 0
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in found.damages.values())


def test_an_expert_that_nothing_reaches_is_worth_the_mean_of_its_layer() -> None:
    rows = tuple(Rows(matrix, 0, 2) for matrix in range(3))
    site = Site("experts", "weight", 3, 4, True, False, (StoredRows("all", rows),))
    squares = backward._OutputSquares((site,))
    for expert, value in ((0, 1.0), (2, 3.0)):
        y = torch.full((5, 2), value, requires_grad=True)
        heard = y * 1
        squares.listen(site.key, expert, heard)
        heard.backward(y.detach())
    found = squares.of(site, site.stored[0], 10).reshape(3, 2)
    assert found.tolist() == [[0.5, 0.5], [2.5, 2.5], [4.5, 4.5]]


def test_candidates_are_compared_on_the_same_windows(make: Make, tmp_path: Path) -> None:
    own = subject(make("Llama 2"), drawn_ids())
    two = dict.fromkeys(own.tensors, Choice("int2", 32).spec(BASE))
    four = dict.fromkeys(own.tensors, Choice("int4", 32).spec(BASE))
    none = dict.fromkeys(own.tensors)
    found = compare(own, {"two": two, "four": four, "none": none}, tmp_path, Progress())
    assert found["two"].value > found["four"].value > 0
    assert found["none"].value == 0


def test_strata_stand_for_all_rows() -> None:
    outputs = np.random.default_rng(0).exponential(size=1000)
    taken, counts = strata(outputs, 50)
    assert 45 <= len(taken) == len(set(taken)) <= 50
    assert counts.sum() == pytest.approx(outputs.sum())
    assert counts.max() <= 1.3 * max(outputs.max(), counts.mean())
    few, own = strata(np.array([1.0, 3.0, 0.0, 2.0]))
    assert (list(few), list(own)) == ([1, 3, 0], [3.0, 2.0, 1.0])
    none, nothing = strata(np.zeros(5))
    assert (list(none), list(nothing)) == ([0], [0.0])


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=300), st.integers(1, 40))
def test_strata_are_few_and_whole(values: list[float], most: int) -> None:
    outputs = np.array(values)
    taken, counts = strata(outputs, most)
    assert len(taken) == len(counts) == len(set(taken)) <= most
    assert counts.sum() == pytest.approx(outputs.sum())


def test_tokens_that_have_most_of_a_text_stand_for_themselves() -> None:
    """A vocabulary by Zipf's law: what rows are worth differs, and is found to a few percent."""
    draw = np.random.default_rng(0)
    shares = np.bincount(draw.zipf(1.1, 16384) % 32000, minlength=32000) / 16384
    errors = draw.lognormal(sigma=0.5, size=32000)
    taken, counts = strata(shares)
    assert len(taken) > 100
    assert counts @ errors[taken] == pytest.approx(shares @ errors, rel=0.1)


def test_some_rows_tell_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 64, generator=generator)
    inputs, outputs = np.ones((1, 64)), np.random.default_rng(0).exponential(size=1024)
    specs = [QuantSpec("int3", 32, "mse")]
    (found,) = damages(weight, inputs, outputs, specs, importance=None, name="w")
    error = (dequantize_tensor(quantize_tensor(weight, specs[0])) - weight).double().square()
    assert found == pytest.approx(0.5 * float(torch.from_numpy(outputs) @ error.sum(1)), rel=0.05)
