"""Files to examples: split, cut, counted and checked."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from irq_convert.errors import IrqError, UsageError
from irq_convert.jobs.finetune.data import SPLIT_SEED, Data, load_data
from irq_convert.jobs.finetune.encode import IGNORED
from tests.paths import ABSENT, SHARED

ALPACA = SHARED / "text" / "alpaca_sample.json"


def load(path: Path, tokenizer: Any, eval_path: Path | None = None, **changes: Any) -> Data:
    settings = {"length": 64, "holdout": 0.1, "vocabulary": 1024, **changes}
    return load_data(path, eval_path, tokenizer, **settings)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def some_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Number {n}:", "completion": f" {n} cats"} for n in range(count)]


def test_a_text_is_one_stream_cut_into_windows(tmp_path: Path, tales: Path, tokenizer: Any) -> None:
    data = load(tales, tokenizer, holdout=0.0)
    stream = torch.cat([example.ids for example in data.train.examples])
    assert stream.tolist() == tokenizer(tales.read_text())["input_ids"]
    assert {len(e.ids) for e in data.train.examples[:-1]} == {64}
    assert all(torch.equal(e.ids, e.labels) for e in data.train.examples)
    assert data.heldout is None
    assert data.train.tokens == len(stream)
    assert data.train.learned == len(stream) - len(data.train.examples)


def test_the_end_of_a_text_is_held_out(tales: Path, tokenizer: Any) -> None:
    data = load(tales, tokenizer, holdout=0.25)
    assert data.heldout is not None
    parts = [
        "".join(tokenizer.decode(e.ids, skip_special_tokens=True) for e in part.examples)
        for part in (data.train, data.heldout)
    ]
    assert "".join(parts) == tales.read_text()
    assert len(parts[1]) == pytest.approx(0.25 * len(tales.read_text()), rel=0.1)


def test_held_out_rows_are_a_random_choice_and_always_the_same(
    tmp_path: Path, tokenizer: Any
) -> None:
    path = write(tmp_path / "a.json", some_rows(50))
    data, again = load(path, tokenizer), load(path, tokenizer, length=32)
    assert data.heldout is not None
    assert again.heldout is not None
    assert (len(data.train.examples), len(data.heldout.examples)) == (45, 5)
    held = [tokenizer.decode(example.ids) for example in data.heldout.examples]
    assert held == [tokenizer.decode(example.ids) for example in again.heldout.examples]
    assert held != [f"<s>Number {n}: {n} cats</s>" for n in range(45, 50)]
    kept = {tokenizer.decode(example.ids) for example in data.train.examples}
    assert len(kept | set(held)) == 50


def test_one_of_two_rows_is_held_out_and_one_alone_is_not(tmp_path: Path, tokenizer: Any) -> None:
    data = load(write(tmp_path / "a.json", some_rows(2)), tokenizer)
    assert data.heldout is not None
    assert (len(data.train.examples), len(data.heldout.examples)) == (1, 1)
    with pytest.raises(UsageError, match="one row cannot be split; give --holdout 0"):
        load(write(tmp_path / "a.json", some_rows(1)), tokenizer)


def test_a_file_of_its_own_is_held_out(tmp_path: Path, tales: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.json", some_rows(5))
    data = load(path, tokenizer, tales, holdout=0.0)
    assert len(data.train.examples) == 5
    assert data.heldout is not None
    assert data.heldout.tokens > 1000
    assert data.eval_file is not None
    assert (data.file.name, data.eval_file.name) == ("a.json", "tales.txt")


def test_what_is_cut_and_what_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "a cat", "completion": " sat"},
        {"prompt": "a cat", "completion": " sat" * 200},
        {"prompt": "a cat" * 200, "completion": " sat"},
        {"prompt": "a cat", "completion": "  \n"},
    ]
    part = load(write(tmp_path / "a.json", rows), tokenizer, holdout=0.0).train
    assert (len(part.examples), part.truncated, part.dropped) == (2, 1, 2)
    assert max(len(example.ids) for example in part.examples) == 64
    assert part.examples[0].ids[-1] == tokenizer.eos_token_id
    assert part.examples[1].ids[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(
    "rows",
    [[{"prompt": "a cat" * 200, "completion": " sat"}], [{"prompt": "a cat", "completion": ""}]],
)
def test_nothing_left_to_learn(tmp_path: Path, tokenizer: Any, rows: list[Any]) -> None:
    path = write(tmp_path / "a.json", rows)
    with pytest.raises(IrqError, match=r"nothing to learn in 1 rows.*--sequence-length 64"):
        load(path, tokenizer, holdout=0.0)


def test_a_text_of_one_token(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(IrqError, match="at least 2 are needed"):
        load(path, tokenizer, holdout=0.0)


def test_ids_beyond_the_vocabulary(tmp_path: Path, tales: Path, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="but the model's vocabulary has 50: use the model's own"):
        load(tales, tokenizer, vocabulary=50)
    path = write(tmp_path / "a.json", some_rows(5))
    with pytest.raises(UsageError, match="vocabulary has 50"):
        load(path, tokenizer, tales, holdout=0.0, vocabulary=50)


@pytest.mark.skipif(not ALPACA.is_file(), reason=ABSENT)
def test_real_instructions(tokenizer: Any) -> None:
    data = load(ALPACA, tokenizer, length=4096, holdout=0.05)
    assert data.heldout is not None
    assert len(data.train.examples) + len(data.heldout.examples) + data.train.dropped == 400
    for example, raw in zip(load(ALPACA, tokenizer, length=4096, holdout=0.0).train.examples,
                            json.loads(ALPACA.read_text()), strict=True):  # fmt: skip
        answer = tokenizer.decode(example.ids[example.labels != IGNORED])
        assert answer == raw["output"] + "</s>"
        assert raw["instruction"] in tokenizer.decode(example.ids[example.labels == IGNORED])


def test_nothing_to_learn_in_what_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a cat", "completion": " "} for _ in range(8)]
    held = random.Random(SPLIT_SEED).sample(range(8), 1)[0]
    rows = [
        r if n == held else {"prompt": "a cat", "completion": " sat"} for n, r in enumerate(rows)
    ]
    with pytest.raises(IrqError, match=r"the 1 rows held out: .*; give --holdout 0"):
        load(write(tmp_path / "a.json", rows), tokenizer, holdout=0.1)
