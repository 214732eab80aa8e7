"""What a card says of an artifact that was fitted to a text."""

from __future__ import annotations

import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from irq_convert.jobs.push.card_body import card_body
from irq_convert.jobs.push.command_again import command_again
from irq_convert.jobs.push.pushed_folder import open_pushed_folder
from irq_convert.jobs.quantize.options import QuantizeOptions
from irq_convert.jobs.quantize.quantize import quantize
from irq_convert.jobs.sizing.options import TargetOptions
from tests.folders import listing
from tests.jobs.calibration.conftest import calibrating
from tests.jobs.calibration.words import word_text, write_word_tokenizer
from tests.tiny import LLAMA, VOCABULARY, llama_tensors, write_source


def test_the_command_and_the_judgement(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", llama_tensors(), LLAMA)
    write_word_tokenizer(source, VOCABULARY)
    text = tmp_path / "words.txt"
    text.write_text(word_text(VOCABULARY, 2000))
    report = quantize(source, tmp_path / "out", calibrating(text, correction=(0.25, 0.5)))
    record = report.calibration
    assert record is not None
    subject = open_pushed_folder(tmp_path / "out")
    words = shlex.split(command_again(subject))
    given = dict(pairwise(words))
    assert given["--calibrate"] == "words.txt"
    assert given["--calibration-tokens"] == "512"
    assert given["--calibration-window"] == "32"
    assert given["--seed"] == "0"
    assert float(given["--correction"]) == record["correction"]
    assert float(given["--damping"]) == record["damping"]
    options = calibrating(text, tokens=1024, window=None)
    quantize(source, tmp_path / "default", options)
    words_of_default = command_again(open_pushed_folder(tmp_path / "default"))
    assert "--calibration-tokens 1024" in words_of_default
    assert "window" not in words_of_default
    assert not [word for word in words if "held" in word or "sweep" in word or "ridge" in word]
    body = card_body(subject, "me/out", None, {})
    assert f"| KL to the source, held out | {record['kl']:.4f}, without data" in body
    assert "| calibrated with | words.txt, 512 tokens |" in body


@pytest.mark.slow
def test_the_command_of_a_target_makes_it_again(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", llama_tensors(), LLAMA)
    write_word_tokenizer(source, VOCABULARY)
    (tmp_path / "words.txt").write_text(word_text(VOCABULARY, 600))
    target = TargetOptions(
        size=300_000, text=str(tmp_path / "words.txt"), tokens=128,
        within=(r"layers\.(\d+)\.self_attn\.[qk]_proj",), at_least=(("o_proj", 3),),
        at_most=(("down_proj", 4),),
    )  # fmt: skip
    options = QuantizeOptions.of(target=target, codebook="int", block_size=32, threads=1)
    quantize(source, tmp_path / "out", options)
    words = shlex.split(command_again(open_pushed_folder(tmp_path / "out")))
    assert words[:3] == ["irq-convert", "quantize", "source"]
    assert "--bits" not in words
    result = subprocess.run(
        [sys.executable, "-m", "irq_convert", *words[1:], "again", "--threads", "1"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert listing(tmp_path / "again") == listing(tmp_path / "out")
