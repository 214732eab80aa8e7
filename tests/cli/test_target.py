"""A size that is asked for, as a person asks: what is shown, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irq_convert.artifact.summary import OTHER, Row
from irq_convert.cli.inspect import _bar
from tests.folders import listing
from tests.jobs.calibration.words import word_text, write_word_tokenizer
from tests.tiny import LLAMA, VOCABULARY, llama_tensors, write_source

from .process import Commands, nothing_left


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_source(tmp_path / "model", llama_tensors(), LLAMA)
    write_word_tokenizer(folder, VOCABULARY)
    (tmp_path / "words.txt").write_text(word_text(VOCABULARY, 600))
    return folder


@pytest.mark.slow
def test_from_a_dry_run_to_an_artifact(irq: Commands, model: Path, tmp_path: Path) -> None:
    asked = ("--target-text", tmp_path / "words.txt", "--target-tokens", 512, "--codebook", "int")
    kept = tmp_path / "kept.safetensors"
    dry = irq(
        "quantize", model, tmp_path / "out", "--target-bits", 3, *asked, "--sensitivity", kept,
        "--dry-run",
    )  # fmt: skip
    assert dry.code == 0
    assert kept.is_file()
    assert not (tmp_path / "out").exists()
    table = dry.out[dry.out.index("what other sizes would give") :].splitlines()
    assert len(table) > 4
    assert sum(line.startswith(">") for line in table) == 1
    assert max(map(len, table)) <= 80
    made = irq(
        "quantize", model, tmp_path / "out", "--target-bits", 3, *asked, "--sensitivity", kept,
        "--json",
    )  # fmt: skip
    assert made.code == 0
    report = json.loads(made.out)
    assert report["bits_per_weight"] <= 3
    assert report["target"]["kept"] in ("mix", "uniform")
    shown = irq("inspect", tmp_path / "out")
    assert "target           3 bits a weight" in shown.out
    assert "KL of the mix" in shown.out
    layers = shown.out[shown.out.index("layer ") :].splitlines()
    assert sum("#" in line for line in layers) in (0, 2)
    assert max(map(len, layers)) <= 80
    assert json.loads(irq("inspect", tmp_path / "out", "--json").out)["target"] == report["target"]


@pytest.mark.parametrize(
    ("quantized", "nbytes", "bar"),
    [
        (100, 50, " ########"),
        (50, 125, " #########+"),
        (0, 200, " #########+"),
        (100, 62, " ##########"),
    ],
)
def test_a_bar_is_of_all_that_lies_in_a_layer(quantized: int, nbytes: int, bar: str) -> None:
    books = ("nf4",) if quantized else ()
    assert _bar(Row("layers.0", 2, 100, quantized, nbytes, books)) == bar
    assert _bar(Row(OTHER, 2, 100, quantized, nbytes, books)) == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--target-size", "3.5"), "--target-size '3.5': write a size with its unit"),
        (("--target-size", "1GB", "--target-bits", "3"), "give one of --target-size and --target"),
        (("--target-tokens", "512"), "--target-tokens goes with --target-size or --target-bits"),
        (("--target-bits", "3", "--bits", "3"), "--bits 3 and a target: the target chooses"),
        (("--at-least", "q=4"), "--at-least goes with --target-size or --target-bits"),
        (("--sensitivity", "s.safetensors"), "--sensitivity goes with --target-size or"),
        (("--target-bits", "3", "--at-most", "q"), "--at-most 'q': write REGEX=BITS"),
        (("--target-bits", "3", "--target-text", "no.txt"), "no.txt"),
    ],
)
def test_wrong_use_is_one_line(
    irq: Commands, model: Path, tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    before = listing(tmp_path)
    result = irq("quantize", model, tmp_path / "out", *words)
    assert result.code == 2
    assert line in result.err
    assert result.err.count("\n") == 1
    assert listing(tmp_path) == before
    nothing_left(tmp_path)
