"""Calibrating every architecture of docs/models.md: what the loop saw is what the artifact does."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import irq_convert
from irq_convert.artifact.manifest import read_manifest
from irq_convert.jobs.calibration import source as text_source
from irq_convert.jobs.calibration.text import choose_windows, tokenize_source
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from tests.architectures.zoo import KINDS, Kind, make_model, write_checkpoint
from tests.jobs.calibration.words import word_text, write_word_tokenizer

VOCABULARY, WINDOW, TOKENS = 96, 16, 256


def _options(text: Path, kind: Kind, **more: bool) -> QuantizeOptions:
    from irq_convert.jobs.calibration.options import CalibrationOptions

    return QuantizeOptions.of(
        bits=2,
        block_size=16,
        calibrate=CalibrationOptions(str(text), tokens=TOKENS, window=WINDOW),
        include_towers=kind.towers,
        **more,
    )


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found[:, :-1].double().log_softmax(-1)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            k, id=k.name, marks=() if k.name in ("Llama 3", "Mixtral") else pytest.mark.slow
        )
        for k in KINDS
    ],
)
def test_what_was_judged_is_what_the_artifact_does(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check_judged(kind, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["Llama 2", "Llama 3", "Gemma 3"])
def test_so_it_is_with_embeddings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untied and tied ones, and those whose class scales what it looks up."""
    kind = next(kind for kind in KINDS if kind.name == name)
    _check_judged(kind, tmp_path, monkeypatch, include_embeddings=True)


def _check_judged(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **more: bool
) -> None:
    # Some architectures have a tokenizer class of their own, which takes no plain words.
    monkeypatch.setattr(text_source, "load_tokenizer", PreTrainedTokenizerFast.from_pretrained)
    warnings.simplefilter("ignore")
    source, out, text = tmp_path / "source", tmp_path / "out", tmp_path / "text.txt"
    write_checkpoint(kind, source)
    write_word_tokenizer(source, VOCABULARY)
    text.write_text(word_text(VOCABULARY, 4 * TOKENS))
    options = _options(text, kind, **more)
    quantize(source, out, options)
    record = read_manifest(out)["calibration"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    windows = choose_windows(*_stream(options, tokenizer))
    ids = windows.ids[windows.calibrating :]
    wanted = _logits(make_model(kind), ids)
    found = _logits(irq_convert.load(out, dtype=torch.float32), ids)
    kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert record["windows"] == TOKENS // WINDOW
    assert record["unseen"] == 0 or kind.vision or kind.experts
    kept = record["kl" if record["kept"] == "calibrated" else "plain"]
    assert kl == pytest.approx(kept, rel=2e-3, abs=1e-6)


def _stream(options: QuantizeOptions, tokenizer: object) -> tuple:
    chosen = options.calibrate
    assert chosen is not None
    ids, name = tokenize_source(chosen, tokenizer)
    return ids, chosen, name
