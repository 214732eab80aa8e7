"""Every bad input of `finetune` and `eval --adapter`: one line, the exit code, nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.hf.artifact import write_artifact
from tests.tiny import tiny_model

from .process import Commands, assert_fails, nothing_left

ROWS = [{"prompt": f"{n} cats", "completion": " sat"} for n in range(10)]


@pytest.fixture(scope="module")
def artifact(demo_nf3: Path) -> Path:
    return demo_nf3


def refuse(irq: Commands, folder: Path, code: int, *args: object) -> Callable[..., None]:
    def check(*words: str) -> None:
        with nothing_left(folder):
            assert_fails(irq(*args, cwd=folder), code, *words)

    return check


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("none.txt", None, 2, ["none.txt", "no such text file"]),
        ("a.txt", b"", 1, ["a.txt", "empty"]),
        ("a.txt", b"caf\xe9", 1, ["a.txt", "not UTF-8", "offset 3"]),
        ("a.json", b'[{"text": "a"},\n oops]', 1, ["a.json", "line 2"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": }\n', 1, ["a.jsonl", "line 3 is not JSON"]),
        ("a.json", b'[{"text": "a"}, {"q": 1, "a": 2}]', 1, ["row 2", "'q', 'a'", "instruction"]),
        ("a.json", b'[{"prompt": "a", "completion": ""}]', 1, ["nothing to learn in 1 rows"]),
        ("a.json", b'[{"prompt": "a", "completion": "b"}]', 2, ["--holdout 0", "--eval-data"]),
    ],
)
def test_data_files(
    irq: Commands, artifact: Path, tmp_path: Path,
    name: str, content: bytes | None, code: int, words: list[str],
) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / name).write_bytes(content)
    holdout = ["--holdout", 0] if code == 1 else []
    refuse(irq, tmp_path, code, "finetune", artifact, "--data", name, "--out", "o", *holdout)(
        *words
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rank", 0], ["--rank 0"]),
        (["--rank", 129], ["--rank 129: ", "has a rank above 128"]),
        (["--batch-size", 6, "--micro-batch", 4], ["--micro-batch 4"]),
        (["--sequence-length", 1000], ["--sequence-length 1000", "256 positions"]),
        (["--target-modules", "q_proj,nope"], ["no module is called 'nope'", "q_proj"]),
        (["--target-modules", "lm_head"], ["lm_head", "output head", "leave it out"]),
        (["--lora", "plain", "--connection", "both"], ["--connection"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--optimizer", "paged-adamw", "--device", "cpu"], ["paged-adamw", "bitsandbytes"]),
        (["--out", "a.json"], ["a.json", "a file, not a folder"]),
        (["--out", "full"], ["full", "not empty and no adapter"]),
        (["--out", "full", "--overwrite"], ["not empty and no adapter"]),
        (["--tokenizer", "nope/"], ["nope"]),
    ],
)
def test_options(
    irq: Commands, artifact: Path, tmp_path: Path, args: list[object], words: list[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "cat.jpg").write_text("cat")
    refuse(irq, tmp_path, 2, "finetune", artifact, "--data", "a.json", "--out", "o", *args)(*words)


def test_models_that_are_no_artifact(irq: Commands, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    tiny_model().save_pretrained(tmp_path / "dense")
    write_artifact(tmp_path / "bare", tiny_model())
    more = ("--data", "a.json", "--out", "o")
    refuse(irq, tmp_path, 2, "finetune", "dense", *more)("dense", "not an irq artifact")
    refuse(irq, tmp_path, 2, "finetune", "./none", *more)("no such folder")
    refuse(irq, tmp_path, 1, "finetune", "bare", *more)("no usable tokenizer", "--tokenizer")
    refuse(irq, tmp_path, 2, "finetune", "bare", *more, "--tokenizer", artifact)(
        "but the model's vocabulary has 80"
    )
    refuse(irq, tmp_path, 2, "finetune", "bare", *more[:3], "bare", "--tokenizer", artifact)(
        "the source itself"
    )


@pytest.mark.slow
def test_adapters_of_eval(irq: Commands, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 40)
    train = ["--steps", 1, "--batch-size", 1, "--rank", 4, "--sequence-length", 32]
    made = irq("finetune", artifact, "--data", tmp_path / "a.txt", "--out", tmp_path / "good",
               *train, "--lora", "plain")  # fmt: skip
    assert made.code == 0, made
    shutil.copytree(artifact, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt", "x": "y"})
    (tmp_path / "other" / "irq_manifest.json").unlink()
    run = ("eval", artifact, "--text", "a.txt", "--context", 32, "--adapter")
    refuse(irq, tmp_path, 2, *run, "./none")("none", "no such folder")
    refuse(irq, tmp_path, 2, *run, "other")("other", "not an adapter")
    other = ("eval", "other", *run[2:], "good")
    refuse(irq, tmp_path, 2, *other)("was trained on the artifact", "--any-base")
    assert irq(*other, "--any-base", cwd=tmp_path).code == 0
    _lose_a_pair(tmp_path / "good", tmp_path / "half")
    refuse(irq, tmp_path, 1, *run, "half")("lacks base_model.model.model.layers.0.mlp.up_proj")
    _cut(tmp_path / "good", tmp_path / "cut")
    refuse(irq, tmp_path, 1, *run, "cut")("adapter_model.safetensors")
    (tmp_path / "good" / "irq_adapter.json").unlink()
    doubted = irq(*run, "good", cwd=tmp_path)
    assert doubted.code == 0, doubted
    assert doubted.err == (
        "irq-convert: good: does not record which artifact it was trained on: not checked\n"
    )


def _lose_a_pair(adapter: Path, out: Path) -> None:
    shutil.copytree(adapter, out)
    tensors = load_file(out / "adapter_model.safetensors")
    kept = {name: t for name, t in tensors.items() if "layers.0.mlp.up_proj" not in name}
    save_file(kept, out / "adapter_model.safetensors")


def _cut(adapter: Path, out: Path) -> None:
    shutil.copytree(adapter, out)
    path = out / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
