"""`finetune --teacher` as a user runs it: what it says, and every wrong use in one line."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.meta_files import MetaModel, write_meta
from tests.jobs.calibration.words import write_word_tokenizer
from tests.jobs.finetune.base import write_tales
from tests.paths import DEMO
from tests.tiny import tiny_model

from .process import Commands, assert_fails, nothing_left

ARGS: list[object] = ["--steps", 2, "--batch-size", 4, "--sequence-length", 48, "--rank", 4]
ARGS += ["--device", "cpu", "--learning-rate", 1e-3]


@pytest.fixture
def tales(tmp_path: Path) -> Path:
    return write_tales(tmp_path / "tales.txt", 3)


@pytest.fixture
def command(demo_nf3: Path, tales: Path) -> list[object]:
    return ["finetune", demo_nf3, "--data", tales, "--out", "out", *ARGS]


def copy_of_demo(folder: Path, **config: Any) -> Path:
    """The demo model, with other settings."""
    shutil.copytree(DEMO, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.mark.slow
def test_a_run(irq: Commands, command: list[object], tmp_path: Path) -> None:
    """A file that is made, found, and refused for another teacher and for other data."""
    run = [*command, "--teacher", DEMO, "--teacher-logits", "logits"]
    with nothing_left(tmp_path):
        dry = irq(*run, "--dry-run", cwd=tmp_path)
        told = json.loads(irq(*run, "--dry-run", "--json", cwd=tmp_path).out)["teacher"]
    assert dry.code == 0, dry
    assert f"will be run layer by layer: logits of {told['tokens']:,} tokens" in dry.out
    assert told["there"] is False
    result = irq(*run, cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    for words in ("held-out KL", "of the KL to model is gone", "training KL"):
        assert words in result.out, words
    assert "perplexity" not in result.out
    assert (tmp_path / "logits").stat().st_size == told["bytes"]
    again = irq(*run, "--dry-run", cwd=tmp_path)
    assert "are there: logits" in again.out
    shutil.rmtree(tmp_path / "out")
    other = copy_of_demo(tmp_path / "other")
    with nothing_left(tmp_path):
        for changed, words in (
            (["--teacher", other], "made by another teacher than other (model)"),
            (["--sequence-length", 32], "other data, lengths or held-out part"),
        ):
            assert_fails(irq(*run, *changed, cwd=tmp_path), 2, "logits: ", words, "remove it")
        (tmp_path / "logits").rename(tmp_path / "whole")
        (tmp_path / "logits").write_bytes((tmp_path / "whole").read_bytes()[:-100])
        assert_fails(irq(*run, cwd=tmp_path), 1, "logits: cut off, damaged", "remove it")
        (tmp_path / "whole").replace(tmp_path / "logits")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--teacher", DEMO, "--teacher-weight", 1.5], ["--teacher-weight 1.5", "from 0 to 1"]),
        (["--teacher", DEMO, "--teacher-weight", "nan"], ["--teacher-weight nan"]),
        (["--teacher-weight", 0.5], ["--teacher-weight", "without --teacher"]),
        (["--teacher-logits", "f"], ["--teacher-logits", "without --teacher"]),
        (["--teacher", "./none"], ["./none", "no such folder"]),
        (["--teacher", DEMO, "--teacher-logits", "."], ["--teacher-logits .", "a folder"]),
        (["--teacher", DEMO, "--teacher-logits", "no/f"], ["no is no folder", "create it"]),
        (["--teacher", DEMO, "--teacher-logits", DEMO / "f"], ["inside the teacher"]),
        (["--teacher", DEMO, "--teacher-logits", "tales.txt"], ["tales.txt", "damaged"]),
    ],
)
def test_options(
    irq: Commands, command: list[object], tmp_path: Path, args: list[object], words: list[str]
) -> None:
    with nothing_left(tmp_path):
        code = 1 if "damaged" in words else 2
        assert_fails(irq(*command, *args, cwd=tmp_path), code, *words)


def test_teachers_that_cannot_teach(
    irq: Commands, command: list[object], demo_nf3: Path, tmp_path: Path
) -> None:
    vocabulary = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    tiny_model().save_pretrained(tmp_path / "small")
    other = copy_of_demo(tmp_path / "words")
    (other / "tokenizer_config.json").unlink()
    write_word_tokenizer(other, vocabulary)
    copy_of_demo(tmp_path / "short", max_position_embeddings=40)
    copy_of_demo(tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    _encoder(tmp_path / "encoder")
    broken = copy_of_demo(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    write_meta(tmp_path / "meta", MetaModel())
    for teacher, code, words in (
        ("meta", 2, ["--teacher meta", "which LLaMA it is", "the same model with config.json"]),
        ("small", 2, ["--teacher small", "vocabulary of 80", f"one of {vocabulary}"]),
        ("words", 2, ["--teacher words", "another tokenizer", "id 0 is"]),
        ("short", 2, ["--teacher short", "40 positions", "lower --sequence-length to 40"]),
        (demo_nf3, 2, ["an artifact, whose weights are packed", "give the dense model"]),
        ("gptq", 1, ["gptq", "already quantized"]),
        ("encoder", 2, ["BertModel cannot be run layer by layer", "leave out --teacher"]),
        ("broken", 1, ["--teacher broken", "NaN or infinite logits"]),
    ):
        with nothing_left(tmp_path):
            assert_fails(irq(*command, "--teacher", teacher, cwd=tmp_path), code, *words)


def _encoder(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=80,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)


@pytest.mark.slow
def test_killed_while_the_teacher_runs(
    irq: Commands, command: list[object], tmp_path: Path
) -> None:
    """The next run begins that stage again, and removes what the killed one has left."""
    running = irq.start(*command, "--teacher", DEMO, cwd=tmp_path)
    state = tmp_path / "out" / ".training"
    while not list(state.glob(".teacher.safetensors.tmp-*")):
        assert not running.finished
    running.kill(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    result = irq(*command, "--teacher", DEMO, cwd=tmp_path)
    assert result.code == 0, result
    assert not state.exists()
