"""`measure` and `--importance` given what they cannot work with: one line, and nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from irq_convert.artifact.importance import read_importance
from irq_convert.jobs.measure.measure import measure
from tests.artifact.imatrix_files import write_gguf, write_list
from tests.folders import change_tensors
from tests.jobs.finetune.base import write_tales
from tests.paths import DEMO

from .process import Commands, assert_fails, nothing_left

SMALL = ("--tokens", 512, "--window", 64, "--threads", 1)


@pytest.fixture
def text(work: Path) -> Path:
    write_tales(work / "tales.txt", 12)
    return work / "tales.txt"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "0"], ["--window 0", "at least 1"]),
        (["--tokens", "3"], ["--tokens 3", "not one window of 64"]),
        (["--window", "512", "--tokens", "512"], ["--window 512", "context of"]),
        (["--text", "none.txt"], ["none.txt: no such text file"]),
        (["--text", "."], ["a folder, not a file"]),
        (["--threads", "0"], ["--threads 0", "at least 1"]),
        (["--device", "foo"], ["device 'foo' cannot be used"]),
        (["--device", "auto"], ["--device auto"]),
        (["--revision", "main"], ["local folder", "revision"]),
        (["--llama-version", "9"], ["--llama-version 9"]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_bad_options(
    irq: Commands, work: Path, text: Path, options: list[str], words: list[str], dry: tuple
) -> None:
    args = ("measure", DEMO, work / "i.safetensors", "--text", text, *SMALL, *options, *dry)
    with nothing_left(work):
        assert_fails(irq(*args, cwd=work), 2, *words)


def test_outputs_that_cannot_be(irq: Commands, work: Path, text: Path) -> None:
    source = work / "model"
    shutil.copytree(DEMO, source)
    (work / "other").write_text("mine")
    measured = work / "i.safetensors"
    measure(source, measured, text=text, tokens=64, window=64)
    for out, more, words in (
        (work, (), "a folder; name a file in it"),
        (work / "none" / "i", (), "is no folder; create it"),
        (source / "i.safetensors", (), f"inside the source {source}"),
        (measured, (), "exists; choose another file, or --overwrite"),
        (work / "other", ("--overwrite",), "no file of importance, and only those are overwritten"),
    ):
        with nothing_left(work):
            result = irq("measure", source, out, "--text", text, *SMALL, *more)
            assert_fails(result, 2, str(out), words)
    with nothing_left(work):
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        result = irq("measure", source, work / "j", "--text", text, *SMALL, **ranks)
        assert_fails(result, 2, "without torchrun")


def test_texts_that_cannot_be(irq: Commands, work: Path) -> None:
    (work / "empty").write_text("")
    (work / "short").write_text("Once upon")
    (work / "latin").write_bytes(b"caf\xe9")
    (work / "rows.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    for name, code, words in (
        ("empty", 1, "the file is empty"),
        ("short", 2, "which are not one window of 64: give more text or a smaller --window"),
        ("latin", 1, "not UTF-8"),
        ("rows.jsonl", 1, 'no field "text" or "messages" (fields: prompt)'),
    ):
        with nothing_left(work):
            result = irq("measure", DEMO, work / "i", "--text", work / name, *SMALL)
            assert_fails(result, code, name, words)


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), 1, ["tokenizer"]),
        (lambda folder: (folder / "config.json").unlink(), 1, ["config.json"]),
        (
            lambda folder: change_tensors(
                folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight")
            ),
            1,
            ["not a whole model", "up_proj"],
        ),
        (
            lambda folder: change_tensors(
                folder,
                lambda t: t.update(
                    {"model.layers.0.mlp.up_proj.weight": torch.zeros(
                        t["model.layers.0.mlp.up_proj.weight"].shape, dtype=torch.uint8)}
                ),
            ),
            1,
            ["up_proj", "U8", "already quantized"],
        ),
    ],
    ids=["no tokenizer", "no config", "a tensor missing", "quantized"],
)  # fmt: skip
def test_sources_that_cannot_be(
    irq: Commands, work: Path, text: Path, spoil: Callable, code: int, words: list[str]
) -> None:
    source = work / "model"
    shutil.copytree(DEMO, source)
    spoil(source)
    with nothing_left(work):
        result = irq("measure", source, work / "i.safetensors", "--text", text, *SMALL)
        assert_fails(result, code, *words)


def test_an_artifact_is_no_source(irq: Commands, work: Path, text: Path, demo_nf3: Path) -> None:
    with nothing_left(work):
        result = irq("measure", demo_nf3, work / "i", "--text", text, *SMALL)
        assert_fails(result, 1, "already quantized", "'irq'")


@pytest.fixture
def file(work: Path, text: Path) -> Path:
    path = work / "i.safetensors"
    measure(DEMO, path, text=text, tokens=64, window=64)
    return path


def _rewrite(path: Path, **more: np.ndarray) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(path, "np") as opened:
        metadata = opened.metadata()
    save_file({**read_importance(path).values, **more}, path, metadata)


@pytest.mark.slow
@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry-run"])
def test_importance_that_cannot_be(irq: Commands, work: Path, file: Path, dry: tuple) -> None:
    first = sorted(read_importance(file).values)[0]
    cols = len(read_importance(file).values[first])
    bad: dict[str, tuple[int, str]] = {}
    for name, values, code, words in (
        ("nan", np.full(cols, np.nan), 1, f"{first} has NaN"),
        ("negative", np.full(cols, -1.0), 1, f"{first} has negative numbers"),
        ("short", np.ones(cols - 1), 2, f"[{cols - 1}], not [{cols}]: the file is of another"),
    ):
        shutil.copy(file, work / name)
        _rewrite(work / name, **{first: values})
        bad[name] = (code, words)
    (work / "cut").write_bytes(file.read_bytes()[:-9])
    (work / "words").write_text("Once upon a time there was a small file.")
    (work / "nothing").write_text("")
    bad |= {"cut": (1, "truncated"), "words": (1, "neither"), "nothing": (1, "ends early")}
    bad |= {"none": (2, "no such file"), ".": (2, "a folder, not a file")}
    shutil.copy(DEMO / "model.safetensors", work / "weights")
    bad["weights"] = (1, "no file of importance")
    write_list(work / "list", {"blk.0.attn_q.weight": np.ones((1, cols))})
    write_gguf(work / "model.gguf", {"blk.0.attn_q.weight": np.ones((1, cols))}, kind="model")
    bad |= {"list": (2, "of another model"), "model.gguf": (1, "no imatrix")}
    for name, (code, words) in bad.items():
        with nothing_left(work):
            result = irq("quantize", DEMO, work / "out", "--importance", work / name, *dry)
            assert_fails(result, code, str(work / name), words)
    with nothing_left(work):
        both = ("--importance", file, "--calibrate", "a.txt", *dry)
        assert_fails(irq("quantize", DEMO, work / "out", *both), 2, "leave out --importance")
        none = ("--importance", file, "--objective", "none", *dry)
        assert_fails(irq("quantize", DEMO, work / "out", *none), 2, "--objective none")
