"""What is measured is what the weights are given: against hooks on the whole model."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import irq_convert
from irq_convert.artifact.importance import read_importance
from irq_convert.artifact.manifest import describe_source
from irq_convert.checkpoint.source import open_checkpoint
from irq_convert.errors import IrqError, UsageError
from irq_convert.hf.layer_calls import NotLayered
from irq_convert.hf.linears import find_linears
from irq_convert.jobs.calibration.sites import Rows, Site, StoredRows
from irq_convert.jobs.calibration.squares import Squares
from irq_convert.jobs.measure import plan as planning
from irq_convert.jobs.measure import run as running
from irq_convert.jobs.measure.measure import estimate_measure, measure
from irq_convert.progress import Progress
from tests.architectures.zoo import BY_NAME, KINDS, make_model
from tests.folders import change_tensors, listing

from .conftest import TOKENS, WINDOW
from .oracle import mean_squares

Make = Callable[[str], Path]


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def measured(source: Path, text: Path, **settings: Any) -> dict[str, np.ndarray]:
    out = source.with_name("importance.safetensors")
    measure(
        source, out, text=text, tokens=TOKENS, window=WINDOW, overwrite=True, threads=1, **settings
    )
    return dict(read_importance(out).values)


def words(text: Path, tokens: int = TOKENS, window: int = WINDOW) -> torch.Tensor:
    """The windows, found anew: those whose hashes with the seed come first, in the text's order."""
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])
    cut = ids[: len(ids) // window * window].view(-1, window)
    keys = [hashlib.sha256(f"0 {number}".encode()).digest() for number in range(len(cut))]
    return cut[sorted(sorted(range(len(cut)), key=keys.__getitem__)[: tokens // window])]


@pytest.mark.parametrize("name", ["Llama 2", "GPT-2", "Phi-3"])
def test_linear_layers(make: Make, text: Path, name: str) -> None:
    source = make(name)
    found = measured(source, text)
    wanted = mean_squares(make_model(BY_NAME[name]), words(text))
    checkpoint = open_checkpoint(source)
    assert set(found) == set(find_linears(checkpoint.config, checkpoint.tensors).tensors)
    for tensor, values in found.items():
        np.testing.assert_allclose(values, wanted[tensor.removesuffix(".weight")], rtol=1e-6)


@pytest.mark.parametrize("name", ["Mixtral", "Mixtral, fused"])
def test_experts(make: Make, text: Path, name: str) -> None:
    source = make(name)
    found = measured(source, text)
    wanted = mean_squares(make_model(BY_NAME[name]), words(text))
    assert len(found) == (32 if name == "Mixtral" else 12)
    for layer in range(2):
        up, down = (wanted[f"model.layers.{layer}.mlp.experts.{part}"] for part in ("up", "down"))
        if name == "Mixtral":
            prefix = f"model.layers.{layer}.block_sparse_moe.experts"
            for expert in range(4):
                for part, values in (("w1", up), ("w3", up), ("w2", down)):
                    own = found[f"{prefix}.{expert}.{part}.weight"]
                    np.testing.assert_allclose(own, values[expert], rtol=1e-6)
        else:
            prefix = f"model.layers.{layer}.mlp.experts"
            np.testing.assert_allclose(found[f"{prefix}.gate_up_proj"], up, rtol=1e-6)
            np.testing.assert_allclose(found[f"{prefix}.down_proj"], down, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_whole_and_layer_by_layer_are_the_same(
    make: Make, text: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(name)
    found = measured(source, text)

    def refuse(*args: Any) -> Any:
        raise NotLayered("it is not")

    monkeypatch.setattr(planning, "open_layered", refuse)
    again = measured(source, text)
    assert set(found) == set(again)
    for tensor, values in found.items():
        np.testing.assert_allclose(values, again[tensor], rtol=1e-5, atol=1e-12, err_msg=tensor)


def test_a_model_that_turns_out_not_to_be_layered_is_loaded_whole(
    make: Make, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("Llama 2")
    found = measured(source, text)

    def refuse(*args: Any) -> Any:
        raise NotLayered("its layers are not called one after the other (1)")

    monkeypatch.setattr(running.Pass, "layered", refuse)
    notes = Notes()
    again = measured(source, text, progress=notes)
    for tensor, values in found.items():
        np.testing.assert_allclose(values, again[tensor], rtol=1e-6)
    assert len(notes.lines) == 1
    assert "loaded whole, since it cannot be run layer by layer: its layers" in notes.lines[0]


def test_a_whole_model_has_to_fit(
    make: Make, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = make("Llama 2")
    before = listing(tmp_path)

    def refuse(*args: Any) -> Any:
        raise NotLayered("it is not")

    monkeypatch.setattr(planning, "open_layered", refuse)
    monkeypatch.setattr(running, "available_memory", lambda: 1000)
    with pytest.raises(IrqError, match=r"whole it takes \d+ bytes \(1.00 GB\).* 1000 bytes"):
        measured(source, text)
    assert listing(tmp_path) == before


def test_the_file_says_what_was_read(make: Make, text: Path, tmp_path: Path) -> None:
    source = make("Llama 2")
    out = tmp_path / "found.safetensors"
    report = measure(source, out, text=text, tokens=TOKENS, window=WINDOW, seed=3)
    found = read_importance(out)
    assert (found.text, found.tokens, found.window) == ("words.txt", TOKENS, WINDOW)
    assert found.source == describe_source(open_checkpoint(source), str(source))
    assert report.bytes == out.stat().st_size
    assert (report.tensors, report.linear, report.unreached, report.experts) == (14, 14, (), 0)
    assert (report.windows, report.how) == (TOKENS // WINDOW, "layer by layer")
    other = measure(source, out, text=text, tokens=TOKENS, window=WINDOW, seed=4, overwrite=True)
    assert other.tokens == report.tokens
    assert read_importance(out).tokens_sha256 != found.tokens_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "source", "words.txt"]


def test_equal_runs_give_equal_bytes(make: Make, text: Path, tmp_path: Path) -> None:
    source = make("Mixtral")
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file in files:
        measure(source, file, text=text, tokens=TOKENS, window=WINDOW, threads=1)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_towers_are_left_out_and_said(make: Make, text: Path, tmp_path: Path) -> None:
    source, notes = make("LLaVA"), Notes()
    out = tmp_path / "found.safetensors"
    report = measure(source, out, text=text, tokens=64, window=16, progress=notes)
    assert report.tensors == 14
    assert report.unreached
    assert all("vision" in name for name in report.unreached)
    assert notes.lines == [
        f"{len(report.unreached)} linear weights of towers see no text and are left out"
    ]


def test_experts_without_tokens_have_the_mean_of_all(tmp_path: Path) -> None:
    tensors = {f"e.{number}.w": torch.ones(2, 3) for number in range(3)}
    from tests.tiny import UNKNOWN, write_source

    checkpoint = open_checkpoint(write_source(tmp_path / "source", tensors, UNKNOWN))
    stored = tuple(StoredRows(f"e.{n}.w", (Rows(n, 0, 2),)) for n in range(3))
    site = Site("e", "w", 3, 3, True, False, stored)
    squares = Squares([site])
    squares.listen("e.w", 0, torch.tensor([[1.0, 2.0, 3.0]]))
    squares.listen("e.w", 1, torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 1.0]]))
    squares.listen("e.w", 2, torch.empty(0, 3))
    found = squares.means(checkpoint)
    assert squares.unreached == 1
    np.testing.assert_array_equal(found["e.0.w"], [1, 4, 9])
    np.testing.assert_array_equal(found["e.1.w"], [2, 2, 1])
    np.testing.assert_allclose(found["e.2.w"], [5 / 3, 8 / 3, 11 / 3])
    assert Squares([site]).means(checkpoint) == {}


def test_inputs_that_overflow_are_named(make: Make, text: Path, tmp_path: Path) -> None:
    source = make("Llama 2")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3] = 1e38

    change_tensors(source, spoil)
    before = listing(tmp_path)
    with pytest.raises(IrqError, match=r"inputs of model\.layers\.0\.mlp\.down_proj overflow"):
        measured(source, text)
    assert listing(tmp_path) == before


def test_a_full_disk_leaves_nothing(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("Llama 2")
    before = listing(tmp_path)

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(IrqError, match="cannot hold hidden states: no space left"):
        measured(source, text)
    assert listing(tmp_path) == before


def test_the_estimate(make: Make, text: Path, tmp_path: Path) -> None:
    source = make("Llama 2")
    before = listing(tmp_path)
    out = tmp_path / "found.safetensors"
    found = estimate_measure(source, out, text=text, tokens=TOKENS, window=WINDOW)
    assert listing(tmp_path) == before
    assert (found.tokens, found.linear, found.how) == (TOKENS, 14, "layer by layer")
    assert found.disk_needed == TOKENS * 32 * 4
    tensors = open_checkpoint(source).tensors
    layer = sum(i.numel for n, i in tensors.items() if n.startswith("model.layers.0."))
    assert found.memory == 4 * max(layer, sum(i.numel for i in tensors.values()) - 2 * layer)


def test_a_context_shorter_than_the_default_window(make: Make, text: Path, tmp_path: Path) -> None:
    found = irq_convert.estimate_measure(make("Llama 2"), tmp_path / "out", text=text)
    assert (found.window, found.tokens) == (64, 64 * found.windows)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 0}, "--window 0: at least 1 token"),
        ({"tokens": 8, "window": 16}, "--tokens 8: not one window of 16"),
        ({"threads": 0}, "--threads 0: at least 1"),
        ({"llama_version": "9"}, "--llama-version 9: choose"),
        ({"window": 100}, "--window 100 is longer than the model's context of 64 tokens"),
        ({"device": "auto"}, "--device auto: name one"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
    ],
)
def test_options_that_cannot_be(make: Make, text: Path, settings: Any, says: str) -> None:
    source = make("Llama 2")
    with pytest.raises(UsageError) as caught:
        irq_convert.measure(source, source.with_name("out"), text=text, **settings)
    assert str(caught.value).startswith(says)
    assert not source.with_name("out").exists()
