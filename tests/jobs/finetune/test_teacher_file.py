"""A teacher's logits: against the model run whole, and what a file is refused for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from irq_convert.checkpoint.locate import open_source
from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.finetune.encode import Example
from irq_convert.jobs.finetune.prepare import Preparation
from irq_convert.jobs.finetune.teacher_file import (
    Contents,
    LogitsWriter,
    TaughtExample,
    all_examples,
    open_logits,
)
from irq_convert.jobs.finetune.teacher_pass import LENGTHS, TeacherPass, buckets, common_length
from irq_convert.jobs.finetune.teacher_source import open_teacher
from irq_convert.progress import Progress
from tests.jobs.calibration.words import write_word_tokenizer
from tests.paths import DEMO
from tests.tiny import tiny_model

from .teaching import prepared

LEARNED = {"n_positions": 64, "n_embd": 96, "n_layer": 2, "n_head": 6}
"""Positions that are learned, of which there are no more than an example is long."""
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def numbered(lengths: list[int], vocabulary: int) -> list[TaughtExample]:
    torch.manual_seed(0)
    found, at = [], 0
    for length in lengths:
        ids = torch.randint(vocabulary, (length,))
        found.append(TaughtExample(ids, ids, at))
        at += length - 1
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("gpt2", LEARNED),
        pytest.param("qwen3_moe", MIXTURE, marks=pytest.mark.slow),
        pytest.param("gemma2", {"sliding_window": 8, "head_dim": 16}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_layer_by_layer_is_the_model_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    """Examples of many lengths, padded to few and their heads asked in pieces; k of 64 of 80."""
    from irq_convert.jobs.finetune import teacher_pass

    monkeypatch.setattr(teacher_pass, "HEAD_ELEMENTS", 7 * 80)
    model = tiny_model(family, **changes)
    model.save_pretrained(tmp_path / "source")
    examples = numbered([64, 5, 33, 2, 40, 33, 9, *[64] * 33], 80)
    contents = Contents.of({"model": "source"}, examples, 80)
    layered = open_teacher("source", open_source(str(tmp_path / "source")))
    assert 1 < len(buckets(layered, examples)) <= LENGTHS
    path = tmp_path / "logits.safetensors"
    with LogitsWriter(path, contents) as file:
        TeacherPass(layered, examples, tmp_path, Progress()).run(file.write)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["logits.safetensors", "source"]
    assert path.stat().st_size == contents.nbytes
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    found = open_logits(path, contents)
    for example in examples:
        ids, log_p = found.rows(example.at, example.rows)
        with torch.no_grad():
            expected = whole(input_ids=example.ids[None]).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(log_p[:, :-1].float(), expected.gather(1, ids.long()),
                                   rtol=1e-3, atol=1e-3)  # fmt: skip
        top = expected.topk(64, 1).values
        torch.testing.assert_close(log_p[:, :-1].float(), top, rtol=1e-3, atol=1e-3)
        rest = expected.scatter(1, ids.long(), -torch.inf).logsumexp(1)
        torch.testing.assert_close(log_p[:, -1].float(), rest, rtol=2e-3, atol=2e-3)
        assert all(len(set(row)) == 64 for row in ids.tolist())
    found.close()


def test_lengths_are_few_and_waste_is_small() -> None:
    for longest in (2, 5, 48, 512, 4097):
        padded = {length: common_length(length, longest) for length in range(2, longest + 1)}
        assert len(set(padded.values())) <= LENGTHS
        assert all(0 <= new - old <= longest / LENGTHS for old, new in padded.items())


@pytest.fixture(scope="module")
def plan(artifact: Path, tales: Path) -> Preparation:
    return prepared(artifact, tales)


@pytest.fixture(scope="module")
def contents(plan: Preparation) -> Contents:
    assert plan.teacher is not None
    return plan.teacher.contents


@pytest.fixture(scope="module")
def kept(plan: Preparation, contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    layered = open_teacher(str(DEMO), open_source(str(DEMO)))
    with LogitsWriter(folder / "logits", contents) as file:
        TeacherPass(layered, all_examples(plan.data), folder, Progress()).run(file.write)
    return folder / "logits"


@pytest.fixture
def made(kept: Path, tmp_path: Path) -> Path:
    """A file to be spoiled."""
    return Path(shutil.copy(kept, tmp_path / "logits.safetensors"))


def test_what_a_file_says(made: Path, contents: Contents) -> None:
    with safe_open(made, "pt") as file:
        told = file.metadata()
        assert set(file.keys()) == {"ids", "log_p"}
        assert file.get_slice("ids").get_dtype() == "U16"
    assert (told["format"], told["format_version"]) == ("irq teacher logits", "1")
    assert (told["k"], told["vocabulary"]) == ("64", str(contents.vocabulary))
    source = json.loads(told["source"])
    assert source["model"] == "model"
    assert {"tensors_sha256", "sample_sha256"} <= set(source)
    assert Contents.of(source, numbered([4], 80), 1 << 17).specs[0].dtype == "I32"


def test_the_hash_is_of_the_ids_and_where_they_are_cut() -> None:
    def of(lengths: list[int]) -> str:
        ids, at, found = torch.arange(12), 0, []
        for length in lengths:
            found.append(TaughtExample(ids[at : at + length], ids[at : at + length]))
            at += length
        return Contents.of({}, found, 80).tokens_sha256

    assert len({of([12]), of([6, 6]), of([5, 7])}) == 3
    ids = torch.arange(12)
    labels = torch.full((12,), -100)
    assert Contents.of({}, [TaughtExample(ids, labels)], 80).tokens_sha256 == of([12])


def change(tensor: str, value: float) -> Callable[[Path], None]:
    def corrupt(path: Path) -> None:
        with safe_open(path, "pt") as file:
            told = file.metadata()
        tensors = load_file(path)
        tensors[tensor][-1, -1] = value
        save_file(tensors, path, told)

    return corrupt


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "kind", "says"),
    [
        (cut, IrqError, "cut off, damaged, or not safetensors: name another --teacher-logits"),
        (change("log_p", float("nan")), IrqError, "has NaN or infinite log-probabilities"),
        (change("ids", 60_000), IrqError, "ids beyond the vocabulary"),
        (change("log_p", 0.0), IrqError, "has probabilities that are not 1 together"),
        (lambda path: shutil.copy(DEMO / "model.safetensors", path), UsageError, "no file of a"),
    ],
)
def test_a_file_that_is_no_good(
    made: Path, contents: Contents, spoil: Callable[[Path], None], kind: type, says: str
) -> None:
    spoil(made)
    with pytest.raises(IrqError, match=says) as raised:
        open_logits(made, contents)
    assert type(raised.value) is kind
    assert str(made) in str(raised.value)


def test_a_file_of_something_else(made: Path, contents: Contents) -> None:
    from dataclasses import replace

    for other, says in (
        (replace(contents, source={"model": "other"}), r"another teacher than other \(model\)"),
        (replace(contents, tokens_sha256="0"), "other data, lengths or held-out part"),
        (replace(contents, vocabulary=99), "another vocabulary"),
    ):
        with pytest.raises(UsageError, match=says):
            open_logits(made, other)


def test_a_teacher_that_gives_nan(tmp_path: Path) -> None:
    contents = Contents.of({"model": "sick"}, numbered([4], 80), 80)
    logits = torch.randn(3, 80)
    logits[1, 7] = float("nan")
    with (
        pytest.raises(IrqError, match="--teacher sick: gives NaN"),
        LogitsWriter(tmp_path / "logits", contents) as file,
    ):
        file.write(0, logits)
    assert not list(tmp_path.iterdir())


def test_the_same_name_and_shapes_are_not_the_same_teacher(
    artifact: Path, tales: Path, plan: Preparation, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(DEMO, tmp_path / "model"))
    same = prepared(artifact, tales, teacher=str(other))
    assert same.recipe == plan.recipe
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    changed = prepared(artifact, tales, teacher=str(other))
    assert changed.recipe.teacher == plan.recipe.teacher
    assert changed.recipe.teacher_sha256 != plan.recipe.teacher_sha256


def test_examples_know_their_rows(plan: Preparation, contents: Contents) -> None:
    at = 0
    for example in all_examples(plan.data):
        assert isinstance(example, Example)
        assert example.at == at
        at += len(example.ids) - 1
    assert contents.rows == at


def test_a_teacher_without_a_tokenizer_is_taken_on_trust(
    artifact: Path, tales: Path, tmp_path: Path
) -> None:
    from irq_convert.jobs.finetune.prepare import prepare
    from irq_convert.jobs.finetune.progress import TrainingProgress

    from .teaching import taught

    notes: list[str] = []

    class Notes(TrainingProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    other = Path(shutil.copytree(DEMO, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    prepare(artifact, tales, taught(teacher=str(other)), progress=Notes())
    assert any("taken on trust" in note for note in notes)
    write_word_tokenizer(other, 96)
    with pytest.raises(UsageError, match=r"has another tokenizer: id \d+ is"):
        prepare(artifact, tales, taught(teacher=str(other)), progress=Notes())
